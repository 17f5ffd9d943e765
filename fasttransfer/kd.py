"""Knowledge distillation from logits: ``kd_loss`` and ``KDLoss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_number, hides_gradient
from fasttransfer.kd_arguments import (
    TEMPERATURES,
    NumItems,
    Options,
    check_batch,
    check_inplace,
    check_logits,
    check_options,
)
from fasttransfer.kd_group import distill_columns, local_parts
from fasttransfer.kd_stats import kd_stats
from fasttransfer.ops import distill as distill_ops
from fasttransfer.ops import kd as kd_ops
from fasttransfer.ops.distill import DistillFunction, distill_op
from fasttransfer.ops.kd import KDFunction, KDInplaceFunction, kd_op
from fasttransfer.sharded_params import is_dtensor


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    label_weight: float | None = None,
    ignore_index: int = -100,
    ignored_rows: str = "skip",
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    num_items: NumItems | None = None,
    scale_by_t2: bool = True,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    standardize: bool = False,
    softcap: float | Sequence[float | None] | None = None,
    inplace: bool = False,
    return_stats: bool = False,
    group: Any = None,
) -> Any:
    r"""Distillation loss of logits, with an optional label term, in one pass over memory.

    Per row, with ``p = softmax(student/T)`` and ``q = softmax(teacher/T)``::

        loss = label_weight * CE(student, label) + (1 - label_weight) * T^2 * D(q, p)

    The cross entropy is at temperature 1. Without labels the loss is ``T^2 * D(q, p)``. Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network" (2015), section 2: ``T^2`` keeps the gradient's size as T changes.

    ============== ========================================================= ======================================
    divergence     D(q, p)
    ============== ========================================================= ======================================
    ``forward_kl`` ``KL(q || p) = sum q log(q/p)``                           the student covers the teacher's mass
    ``reverse_kl`` ``KL(p || q) = sum p log(p/q)``                           it keeps to where the teacher has some
    ``jsd``        ``beta KL(q || m) + (1-beta) KL(p || m)``,                bounded; ``jsd_beta`` 0 and 1 are
                   ``m = beta q + (1-beta) p``                               forward and reverse KL (as in TRL)
    ``tvd``        ``sum |p - q| / 2``                                       total variation, in [0, 1]
    ============== ========================================================= ======================================

    The gradient is computed in the forward pass, while the row is in cache, and kept instead of the logits.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16 or float64. Any strides: a view such as
            ``logits[:, :-1]`` is read in place.
        teacher_logits: ``[..., V]``, same leading dimensions and device; its dtype may differ. Precomputed
            log-probabilities will do: at any temperature their softmax is that of the logits. Where it requires a
            gradient it gets one, which costs time: compute the teacher under ``torch.no_grad()``.
        labels: ``[...]`` int64 class indices, or None.
        temperature: ``T > 0`` (1e-30 to 1e30); a number, or a float tensor ``[...]`` with one temperature per row. In
            fp32 the divergence is accurate to 1e-7 absolute, so with ``T^2`` to ``1e-7 T^2``.
        label_weight: Weight of the label term in [0, 1]. Must be given with ``labels`` (0.0: labels only say which
            rows are ignored), must not be given without.
        ignore_index: Label of an ignored row.
        ignored_rows: ``"skip"``: an ignored row contributes nothing and is not read. ``"distill"``: it is distilled
            without a label term; under ``"mean"`` the label term is then averaged over labelled rows and the
            distillation term over all rows.
        label_smoothing: In [0, 1], as in ``torch.nn.functional.cross_entropy``.
        row_weight: ``[...]`` weight per row (float, integer or bool), default 1. A row of weight 0 is not read.
        vocab_size: Only the first ``vocab_size`` columns count, on both sides (padded vocabularies); the gradient of
            the others is 0. Required where the widths differ.
        reduction: ``"mean"``: ``sum_i w_i loss_i / sum_i w_i`` over the counted rows. ``"batchmean"``: sum divided by
            the first dimension, as in ``F.kl_div``. ``"sum"``. ``"none"``: ``[...]``, weighted, 0 for ignored rows.
        num_items: Replaces the divisor of ``"mean"`` or ``"batchmean"`` (gradient accumulation, data parallelism): a
            number or a one-element tensor. With ``ignored_rows="distill"``, a pair ``(rows, labelled rows)`` sets
            the two divisors apart.
        scale_by_t2: Multiply the distillation term, and so its gradient, by ``T^2``.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"`` or ``"tvd"``: see above.
        jsd_beta: The teacher's share of the mixture in [0, 1], for ``"jsd"`` only: Agarwal et al., "On-Policy
            Distillation of Language Models" (2024), eq. 2.
        standardize: For the divergence, take ``(z - mean) / (deviation + 1e-7)`` of each row on both sides, T being
            the base temperature: Sun et al., "Logit Standardization in Knowledge Distillation" (2024). The deviation
            is divided by V - 1, as in the authors' code (the paper's formula divides by V: a T that is larger by
            ``sqrt(V/(V-1))``). Mean and deviation are of the logits above -inf; the gradient goes through both.
        softcap: ``c tanh(z/c)`` of every logit (Gemma 2) before all else, also for the label term: a number for both
            sides or a pair (student's, teacher's) with None for none. A logit of -inf stays -inf.
        inplace: Overwrite ``student_logits`` with its gradient instead of allocating one. Only where a gradient is
            recorded, for a non-leaf tensor or a view of the whole of one. Using the logits again in the graph is an
            error in backward. Under ``torch.compile`` it says nothing: the compiler plans the memory.
        return_stats: Return ``(loss, KDStats)``: KL, cross entropy, entropies and top-1 agreement of the same passes.
        group: A ``torch.distributed`` process group over whose ranks the columns of the logits are split: below.

    Returns:
        A float32 tensor (float64 if either input is): a scalar, or ``[...]`` for ``reduction="none"``. If no row is
        counted, exactly 0 with a zero gradient.

    Special values: a student logit of -inf has probability 0, which is free where the teacher has no mass. Where it
    has some, forward KL is +inf with a finite gradient; likewise reverse KL at a teacher's -inf, with a gradient of 0
    (as is the teacher's where forward KL is +inf). ``jsd`` and ``tvd`` are finite; where p = q the derivative of
    ``tvd`` is taken as 0. A NaN, a +inf, or a row of -inf throughout on a side that is read makes that row's loss and
    gradient NaN.

    Split vocabularies: with ``group``, each rank passes its own columns of both logits, ``[..., V_local]``, in the
    order of the ranks; their number may differ from rank to rank. All else is the same on all ranks: ``labels`` and
    ``vocab_size`` count the columns of the whole row. Every rank gets the same loss, that of whole rows. Each calls
    backward on its copy and gets the gradient for its own columns once: nothing is summed or multiplied over the ranks,
    and backward exchanges nothing. The forward takes one all-gather of 40 bytes per row, and one each for ``labels`` or
    ``vocab_size``, ``standardize`` (two with a gradient), ``jsd`` and ``tvd``. It runs in plain torch, and between the
    graphs of ``torch.compile``. DTensors with ``Shard(-1)`` on one mesh dimension need no ``group``; the loss is a
    plain tensor. ``inplace`` is not available.

    Rows split over ranks need no ``group``. Pass as ``num_items`` the sum over the ranks of the counted rows: losses
    and gradients then add up to those of the whole batch. Where gradients are averaged (DDP, FSDP), pass that sum
    divided by the number of ranks.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, devices or options that do not fit, a label out of range or a temperature that is not
            positive (values are checked on the CPU; on other devices only under ``FASTTRANSFER_CHECK=1``, and
            without it an out-of-range label makes its row NaN).
        RuntimeError: In backward, under ``create_graph=True``.

    Example:
        >>> loss = kd_loss(student(x), teacher_logits, temperature=4.0)
        >>> loss = kd_loss(student(x), teacher_logits, y, temperature=4.0, label_weight=0.5)
    """
    options = check_options(
        label_weight, ignore_index, ignored_rows, label_smoothing, vocab_size, reduction, scale_by_t2, inplace,
        divergence, jsd_beta, standardize, softcap, return_stats, group,
    )  # fmt: skip
    return distill_rows(student_logits, teacher_logits, labels, temperature, row_weight, num_items, options)


class KDLoss(nn.Module):
    """``kd_loss`` as a module: the options once, the tensors per batch.

    Args:
        temperature: As in ``kd_loss``; a number here, which a call may replace.
        label_weight: As in ``kd_loss``. If given, every call takes labels.
        ignore_index: As in ``kd_loss``.
        ignored_rows: As in ``kd_loss``.
        label_smoothing: As in ``kd_loss``.
        vocab_size: As in ``kd_loss``.
        reduction: As in ``kd_loss``.
        scale_by_t2: As in ``kd_loss``.
        divergence: As in ``kd_loss``.
        jsd_beta: As in ``kd_loss``.
        standardize: As in ``kd_loss``.
        softcap: As in ``kd_loss``.
        inplace: As in ``kd_loss``.
        return_stats: As in ``kd_loss``.
        group: As in ``kd_loss``. A module that has one cannot be copied or pickled.

    Raises:
        TypeError, ValueError: As ``kd_loss``, at construction for the options given here.

    Example:
        >>> criterion = KDLoss(temperature=4.0, label_weight=0.5)
        >>> loss = criterion(student(x), teacher_logits, y)
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        label_weight: float | None = None,
        ignore_index: int = -100,
        ignored_rows: str = "skip",
        label_smoothing: float = 0.0,
        vocab_size: int | None = None,
        reduction: str = "mean",
        scale_by_t2: bool = True,
        divergence: str = "forward_kl",
        jsd_beta: float = 0.5,
        standardize: bool = False,
        softcap: float | Sequence[float | None] | None = None,
        inplace: bool = False,
        return_stats: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, *TEMPERATURES)
        self.options = check_options(
            label_weight, ignore_index, ignored_rows, label_smoothing, vocab_size, reduction, scale_by_t2, inplace,
            divergence, jsd_beta, standardize, softcap, return_stats, group,
        )  # fmt: skip

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: NumItems | None = None,
    ) -> Any:
        """Of one batch; arguments as in ``kd_loss``, ``temperature=None`` meaning the module's."""
        if temperature is None:
            temperature = self.temperature
        return distill_rows(
            student_logits, teacher_logits, labels, temperature, row_weight, num_items, self.options
        )

    def extra_repr(self) -> str:
        """The temperature and every option that differs from its default."""
        defaults = Options(None, -100, False, 0.0, None, "mean", True, False)
        shown: dict[str, object] = {"temperature": self.temperature}
        given = zip(self.options._fields, self.options, defaults, strict=True)
        shown.update((name, value) for name, value, default in given if value != default)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def distill_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    options: Options,
) -> Any:
    """Check what a batch brings, then run: the loss, or with ``return_stats`` a pair."""
    if options.group is not None or is_dtensor(student) or is_dtensor(teacher):
        rows = {
            "labels": labels,
            "temperature": temperature,
            "row_weight": row_weight,
            "num_items": num_items,
        }
        student, teacher, here, shards = local_parts(student, teacher, rows, options)
        labels, temperature, row_weight, num_items = here.values()
        if shards is not None:
            return distill_columns(
                student, teacher, labels, temperature, row_weight, num_items, shards, options
            )
    columns = check_logits(student, teacher, options.vocab_size)
    args = check_batch(student, columns, labels, temperature, row_weight, num_items, options)
    weight = args[1]

    recording = torch.is_grad_enabled()
    # Under torch.compile the compiler plans the memory: an op that mutates would only be made functional again.
    inplace = options.inplace and recording and student.requires_grad and not torch.compiler.is_compiling()
    if options.plain and not (recording and teacher.requires_grad):
        if not (recording and student.requires_grad) and not hides_gradient((student, teacher)):
            return kd_op(student, teacher, *args, False)[0]
        if inplace:
            memory = check_inplace(student, teacher)
            return KDInplaceFunction.apply(memory, student.shape, teacher, kd_ops.run_inplace(args))[0]
        return KDFunction.apply(student, teacher, args)

    all_args = (
        *args, options.divergence, list(options.divergence_args), options.standardize, list(options.softcap),
        options.return_stats,
    )  # fmt: skip
    if inplace:
        memory = check_inplace(student, teacher)
        loss, _, stats = KDInplaceFunction.apply(
            memory, student.shape, teacher, distill_ops.run_inplace(all_args)
        )
    elif recording or hides_gradient((student, teacher)):
        loss, stats = DistillFunction.apply(student, teacher, all_args)
    else:
        loss, *_, stats = distill_op(student, teacher, *all_args[:-1], False, all_args[-1], False)
    if not options.return_stats:
        return loss
    return loss, kd_stats(loss, stats, labels, weight, options)
