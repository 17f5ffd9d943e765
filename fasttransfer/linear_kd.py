"""Knowledge distillation from hidden states and heads: ``linear_kd_loss`` and ``LinearKDLoss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_count, check_number, check_tensor, hides_gradient, shape
from fasttransfer.kd_arguments import (
    TEMPERATURES,
    NumItems,
    Options,
    check_batch,
    check_columns,
    check_options,
)
from fasttransfer.kd_stats import kd_stats
from fasttransfer.ops import linear_kd as ops

_SUMS = {torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # by width


def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    accum_dtype: torch.dtype | None = None,
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
    return_stats: bool = False,
) -> Any:
    r"""``kd_loss`` of ``hidden @ head.T + bias`` on both sides, without the ``[rows, V]`` logits in memory.

    The same as ::

        kd_loss(F.linear(student_hidden, student_head, student_bias),
                F.linear(teacher_hidden, teacher_head, teacher_bias), labels, ...)

    computed a chunk of rows at a time: the two products, the loss of the chunk, whose student logits become their
    gradient in place, and the two products of the gradients, in the forward pass. Beside the gradients it takes two
    buffers ``[chunk_rows, V]``. The four matrix products are those of whole logits, and none is computed twice; only
    ``reduction="none"`` with a trained head or bias repeats the first two in backward, when the weights of the rows
    are known. (Liger kernels and cut cross entropy chunk likewise: Wijmans et al., "Cut Your Losses in
    Large-Vocabulary Language Models" (2024), section 3.)

    Args:
        student_hidden: ``[..., H_s]``, float32, bfloat16, float16 or float64. Without a gradient (a frozen body) its
            product is left out.
        student_head: ``[V, H_s]``, as ``nn.Linear.weight``, of the same dtype; likewise left out where frozen.
        teacher_hidden: ``[..., H_t]``, same leading dimensions and device; width and dtype may differ. The teacher is
            a constant: where gradients are recorded, none of its tensors may require one.
        teacher_head: ``[V, H_t]``, of ``teacher_hidden``'s dtype.
        labels: ``[...]`` int64 class indices, or None.
        student_bias: ``[V]``, of the head's dtype. An entry of -inf masks the column.
        teacher_bias: ``[V]``.
        chunk_rows: Rows per chunk. Default: as many as fit into 32 MiB or the size of the student's head, whichever is
            larger, for both sides' logits. On the CPU fewer than a few hundred cost time: a chunk reads both heads.
        accum_dtype: What the gradients of head and bias are summed in over the chunks: bfloat16 (for bfloat16 only),
            float32 or float64, at least as wide as they are. Default: float32, or float64 for float64. A bfloat16 head
            is then rounded once, as by one product, and takes 4 bytes more per weight until it is; summed in bfloat16
            it is rounded with every chunk. (Under autocast the gradient of a float32 head is float32 and costs
            nothing more.) In float16 the gradients wait in float32 for the upstream one, which has the loss scale.
        temperature: As in ``kd_loss``, and so are all further options.
        label_weight: Weight of the label term in [0, 1]: with ``labels``, and only with them.
        ignore_index: Label of an ignored row.
        ignored_rows: ``"skip"`` or ``"distill"``. On the CPU a row that does not count costs no product.
        label_smoothing: In [0, 1].
        row_weight: ``[...]`` weight per row.
        vocab_size: Only the first ``vocab_size`` rows of both heads count; the others are not read. Required where
            the heads have different numbers of rows.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``. Divisors are of all rows, not of a chunk's.
        num_items: Replaces the divisor.
        scale_by_t2: Multiply the distillation term by ``T^2``.
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"`` or ``"tvd"``.
        jsd_beta: The teacher's share of the mixture of ``"jsd"``.
        standardize: Of both sides' logits.
        softcap: Of both sides' logits, or a pair.
        return_stats: Return ``(loss, KDStats)``.

    Returns:
        A float32 tensor (float64 if either side is): a scalar, or ``[...]`` for ``reduction="none"``.

    Under autocast hidden states, heads and biases are cast as by ``F.linear``. Logits are rounded to the dtype of the
    product, as those of ``F.linear`` are. Special values: as in ``kd_loss``; a NaN in the hidden state of a row that
    does not count changes nothing.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: As ``kd_loss``; sizes or dtypes of hidden states, heads and biases that do not fit each other; a
            teacher that requires a gradient.
        RuntimeError: In backward, under ``create_graph=True``.

    Example:
        >>> with torch.no_grad():
        ...     teacher_hidden = teacher.body(x)
        >>> loss = linear_kd_loss(student.body(x), student.head.weight, teacher_hidden, teacher.head.weight.detach())
    """
    options = check_options(
        label_weight, ignore_index, ignored_rows, label_smoothing, vocab_size, reduction, scale_by_t2, False,
        divergence, jsd_beta, standardize, softcap, return_stats,
    )  # fmt: skip
    return _linear_kd(
        (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias), labels, temperature,
        row_weight, num_items, options, _check_chunk_rows(chunk_rows), accum_dtype,
    )  # fmt: skip


class LinearKDLoss(nn.Module):
    """``linear_kd_loss`` as a module: the options once, the tensors per batch.

    Args:
        chunk_rows: As in ``linear_kd_loss``.
        accum_dtype: As in ``linear_kd_loss``.
        temperature: As in ``kd_loss``; a number here, which a call may replace.
        label_weight: As in ``kd_loss``. If given, every call takes labels.
        ignore_index: As in ``kd_loss``.
        ignored_rows: As in ``kd_loss``.
        label_smoothing: As in ``kd_loss``.
        vocab_size: As in ``linear_kd_loss``.
        reduction: As in ``kd_loss``.
        scale_by_t2: As in ``kd_loss``.
        divergence: As in ``kd_loss``.
        jsd_beta: As in ``kd_loss``.
        standardize: As in ``kd_loss``.
        softcap: As in ``kd_loss``.
        return_stats: As in ``kd_loss``.

    Raises:
        TypeError, ValueError: As ``linear_kd_loss``, at construction for the options given here.

    Example:
        >>> criterion = LinearKDLoss(temperature=2.0)
        >>> loss = criterion(student.body(x), student.head.weight, teacher_hidden, teacher_head)
    """

    def __init__(
        self,
        *,
        chunk_rows: int | None = None,
        accum_dtype: torch.dtype | None = None,
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
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        self.chunk_rows, self.accum_dtype = chunk_rows, accum_dtype
        _check_chunk_rows(chunk_rows)
        if accum_dtype is not None:
            _check_accum_dtype(accum_dtype)
        self.temperature = check_number("temperature", temperature, *TEMPERATURES)
        self.options = check_options(
            label_weight, ignore_index, ignored_rows, label_smoothing, vocab_size, reduction, scale_by_t2, False,
            divergence, jsd_beta, standardize, softcap, return_stats,
        )  # fmt: skip

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        temperature: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: NumItems | None = None,
    ) -> Any:
        """Of one batch; arguments as in ``linear_kd_loss``, ``temperature=None`` meaning the module's."""
        return _linear_kd(
            (student_hidden, student_head, student_bias), (teacher_hidden, teacher_head, teacher_bias), labels,
            self.temperature if temperature is None else temperature, row_weight, num_items, self.options,
            _check_chunk_rows(self.chunk_rows), self.accum_dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The temperature and every option that differs from its default."""
        defaults = Options(None, -100, False, 0.0, None, "mean", True, False)
        shown: dict[str, object] = {"temperature": self.temperature}
        given = zip(self.options._fields, self.options, defaults, strict=True)
        shown.update((name, value) for name, value, default in given if value != default)
        own = {"chunk_rows": self.chunk_rows, "accum_dtype": self.accum_dtype}
        shown.update((name, value) for name, value in own.items() if value is not None)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


_Side = tuple[Tensor, Tensor, Tensor | None]


def _linear_kd(
    student: _Side,
    teacher: _Side,
    labels: Tensor | None,
    temperature: float | Tensor,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    options: Options,
    chunk_rows: int,
    accum_dtype: torch.dtype | None,
) -> Any:
    """Check what a batch brings, then run: the loss, or with ``return_stats`` a pair."""
    device = student[0].device if isinstance(student[0], Tensor) else None
    product = None
    if device is not None and torch.is_autocast_enabled(device.type):
        product = torch.get_autocast_dtype(device.type)
    _check_side("student", student, product)
    _check_side("teacher", teacher, product)
    if student[0].shape[:-1] != teacher[0].shape[:-1]:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same leading dimensions, "
            f"got {shape(student[0])} and {shape(teacher[0])}"
        )
    if teacher[0].device != device:
        raise ValueError(f"teacher_hidden is on {teacher[0].device}, student_hidden on {device}")
    columns = check_columns(
        len(student[1]), len(teacher[1]), options.vocab_size, ("student_head", "teacher_head")
    )
    if accum_dtype is not None:
        _check_accum_dtype(accum_dtype, student[1].dtype)
    args = check_batch(student[0], columns, labels, temperature, row_weight, num_items, options)

    recording = torch.is_grad_enabled()
    for name, x in zip(("hidden", "head", "bias"), teacher, strict=True):
        if recording and x is not None and x.requires_grad:
            raise ValueError(
                f"teacher_{name} requires grad, but the teacher is a constant of linear_kd_loss: "
                f"compute it under torch.no_grad() or pass teacher_{name}.detach()"
            )
    all_args = (
        *args, options.divergence, list(options.divergence_args), options.standardize, list(options.softcap),
        options.return_stats,
    )  # fmt: skip
    call = ops.Call(all_args, chunk_rows, accum_dtype, product)
    sides = (*student, *teacher)
    given = [x for x in sides if x is not None]
    if (recording and any(x.requires_grad for x in given)) or hides_gradient(given):
        loss, stats = ops.LinearKDFunction.apply(call, *sides)
    else:
        loss, *_, stats = ops.run(sides, call, [None] * 3)
    if not options.return_stats:
        return loss
    return loss, kd_stats(loss, stats, labels, args[1], options)


def _check_side(side: str, tensors: _Side, product: torch.dtype | None) -> None:
    """Hidden states, head and bias of one side fit each other."""
    hidden, head, bias = tensors
    check_tensor(f"{side}_hidden", hidden)
    check_tensor(f"{side}_head", head)
    if hidden.dim() == 0 or head.dim() != 2 or hidden.shape[-1] != head.shape[1] or head.shape[1] == 0:
        raise ValueError(
            f"{side}_hidden must be [..., H] and {side}_head [V, H] with the same H > 0, "
            f"got {shape(hidden)} and {shape(head)}"
        )
    others = [(f"{side}_head", head)]
    if bias is not None:
        check_tensor(f"{side}_bias", bias)
        if bias.shape != head.shape[:1]:
            raise ValueError(f"{side}_bias must be [V] = [{len(head)}], got {shape(bias)}")
        others.append((f"{side}_bias", bias))
    for name, x in others:
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, {side}_hidden on {hidden.device}")
        if _cast(x.dtype, product) != _cast(hidden.dtype, product):
            raise TypeError(f"{name} is {x.dtype}, {side}_hidden {hidden.dtype}: they must be the same")


def _cast(dtype: torch.dtype, product: torch.dtype | None) -> torch.dtype:
    """What autocast makes of a dtype."""
    return dtype if product is None or dtype == torch.float64 else product


def _check_chunk_rows(chunk_rows: int | None) -> int:
    """Return the number, 0 for None."""
    return 0 if chunk_rows is None else check_count("chunk_rows", chunk_rows)


def _check_accum_dtype(accum_dtype: Any, head: torch.dtype = torch.bfloat16) -> None:
    if not isinstance(accum_dtype, torch.dtype):
        raise TypeError(f"accum_dtype must be a torch.dtype or None, got {accum_dtype!r}")
    if accum_dtype == torch.float16:
        raise ValueError(
            "accum_dtype must not be float16: gradients before a loss scale, and their sums, leave its range"
        )
    if accum_dtype not in _SUMS:
        raise ValueError(f"accum_dtype must be bfloat16, float32 or float64, got {accum_dtype}")
    least = torch.float32 if head == torch.float16 else head
    if _SUMS[accum_dtype] < _SUMS[least]:
        raise ValueError(f"accum_dtype must be at least as wide as {least}, got {accum_dtype}")
