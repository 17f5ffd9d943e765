"""Knowledge distillation from logits: ``kd_loss`` and ``KDLoss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.checks import (
    check_choice,
    check_flag,
    check_number,
    check_tensor,
    hides_gradient,
    shape,
    values_visible,
)
from fasttransfer.memory import overlaps_itself
from fasttransfer.ops.kd import KDFunction, KDInplaceFunction, kd_op

NumItems = int | float | Tensor | Sequence[float]

_REDUCTIONS = ("mean", "batchmean", "sum", "none")
_IGNORED_ROWS = ("skip", "distill")
_INT64 = (torch.int64,)
# Beyond, T^2 and 1/T leave the range of their types.
_TEMPERATURES = (1e-30, 1e30)


class _Options(NamedTuple):
    """What does not change from batch to batch, checked."""

    label_weight: float | None
    ignore_index: int
    distill_ignored: bool
    label_smoothing: float
    vocab_size: int | None
    reduction: str
    scale_by_t2: bool
    inplace: bool


def _check_options(
    label_weight: float | None,
    ignore_index: int,
    ignored_rows: str,
    label_smoothing: float,
    vocab_size: int | None,
    reduction: str,
    scale_by_t2: bool,
    inplace: bool,
) -> _Options:
    if label_weight is not None:
        label_weight = check_number("label_weight", label_weight, 0, 1)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int64, got {ignore_index}")
    if vocab_size is not None and (
        isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt))
    ):
        raise TypeError(f"vocab_size must be an int or None, got {vocab_size!r}")
    return _Options(
        label_weight,
        ignore_index,
        check_choice("ignored_rows", ignored_rows, _IGNORED_ROWS) == "distill",
        check_number("label_smoothing", label_smoothing, 0, 1),
        vocab_size,
        check_choice("reduction", reduction, _REDUCTIONS),
        check_flag("scale_by_t2", scale_by_t2),
        check_flag("inplace", inplace),
    )


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
    inplace: bool = False,
) -> Tensor:
    r"""Distillation loss of logits, with an optional label term, in one pass over memory.

    Per row, with ``p = softmax(student/T)`` and ``q = softmax(teacher/T)``::

        loss = label_weight * CE(student, label) + (1 - label_weight) * T^2 * KL(q || p)

    The cross entropy is at temperature 1. Without labels the loss is ``T^2 * KL(q || p)``. Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network" (2015), section 2: ``T^2`` keeps the gradient's size as T changes.

    The gradient is computed in the forward pass, while the row is in cache, and kept instead of the logits.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16 or float64. Any strides: a view such as
            ``logits[:, :-1]`` is read in place.
        teacher_logits: ``[..., V]``, same leading dimensions and device; its dtype may differ. It is a constant:
            where gradients are recorded it must not require one.
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
        inplace: Overwrite ``student_logits`` with its gradient instead of allocating one. Only where a gradient is
            recorded, for a non-leaf tensor or a view of the whole of one. Using the logits again in the graph is an
            error in backward. Under ``torch.compile`` it says nothing: the compiler plans the memory.

    Returns:
        A float32 tensor (float64 if either input is): a scalar, or ``[...]`` for ``reduction="none"``. If no row is
        counted, exactly 0 with a zero gradient.

    Special values: a student logit of -inf has probability 0, which is free where the teacher has no mass and costs
    +inf where it has (the gradient stays finite). A NaN, a +inf, or a row of -inf throughout on a side that is read
    makes that row's loss and gradient NaN.

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
    options = _check_options(
        label_weight, ignore_index, ignored_rows, label_smoothing, vocab_size, reduction, scale_by_t2, inplace
    )
    return _kd(student_logits, teacher_logits, labels, temperature, row_weight, num_items, options)


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
        inplace: As in ``kd_loss``.

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
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, *_TEMPERATURES)
        self.options = _check_options(
            label_weight,
            ignore_index,
            ignored_rows,
            label_smoothing,
            vocab_size,
            reduction,
            scale_by_t2,
            inplace,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: NumItems | None = None,
    ) -> Tensor:
        """The loss of one batch; arguments as in ``kd_loss``, ``temperature=None`` meaning the module's."""
        if temperature is None:
            temperature = self.temperature
        return _kd(student_logits, teacher_logits, labels, temperature, row_weight, num_items, self.options)

    def extra_repr(self) -> str:
        """The temperature and every option that differs from its default."""
        defaults = _Options(None, -100, False, 0.0, None, "mean", True, False)
        shown: dict[str, object] = {"temperature": self.temperature}
        given = zip(self.options._fields, self.options, defaults, strict=True)
        shown.update((name, value) for name, value, default in given if value != default)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _kd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float | Tensor,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    options: _Options,
) -> Tensor:
    """Check what a batch brings, then run."""
    columns = _check_logits(student, teacher, options.vocab_size)
    _check_labels(labels, student, columns, options)
    constant_t, row_t = _check_temperature(temperature, student)
    weight = None if row_weight is None else _row_values("row_weight", row_weight, student)
    items, items_tensor = _check_num_items(num_items, student, labels is not None, options)
    if options.reduction == "batchmean" and student.dim() == 1:
        raise ValueError(
            "reduction='batchmean' needs student_logits with a first dimension beside V, got one row [V]"
        )
    args = (
        labels, weight, row_t, items_tensor, items, constant_t, options.label_weight or 0.0, options.label_smoothing,
        options.ignore_index, options.distill_ignored, columns, options.reduction, options.scale_by_t2,
    )  # fmt: skip

    recording = torch.is_grad_enabled()
    if recording and teacher.requires_grad:
        raise ValueError(
            "teacher_logits requires grad, but the teacher is a constant of kd_loss: "
            "compute it under torch.no_grad() or pass teacher_logits.detach()"
        )
    if not (recording and student.requires_grad) and not hides_gradient((student,)):
        return kd_op(student, teacher, *args, False)[0]
    # Under torch.compile the compiler plans the memory: an op that mutates would only be made functional again.
    if options.inplace and student.requires_grad and not torch.compiler.is_compiling():
        memory = _check_inplace(student, teacher)
        return KDInplaceFunction.apply(memory, student.shape, teacher, args)[0]
    return KDFunction.apply(student, teacher, args)


def _check_logits(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    """Return how many columns count."""
    check_tensor("student_logits", student)
    check_tensor("teacher_logits", teacher)
    if student.device != teacher.device:
        raise ValueError(f"teacher_logits is on {teacher.device}, student_logits on {student.device}")
    if student.dim() == 0 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must be [..., V] with the same leading dimensions, "
            f"got {shape(student)} and {shape(teacher)}"
        )
    width, teacher_width = student.shape[-1], teacher.shape[-1]
    if vocab_size is None:
        if width != teacher_width:
            raise ValueError(
                f"student_logits has {width} columns and teacher_logits {teacher_width}: if the vocabularies agree "
                "on the first columns and the rest is padding, pass vocab_size="
            )
        vocab_size = width
    elif not 0 < vocab_size <= min(width, teacher_width):
        raise ValueError(
            f"vocab_size must be between 2 and the smaller width, got {vocab_size} for {width} columns of "
            f"student_logits and {teacher_width} of teacher_logits"
        )
    if vocab_size < 2:
        raise ValueError(
            f"softmax over {vocab_size} column(s) says nothing. A binary head with one logit z is the two logits "
            "[0, z]: pass torch.cat([torch.zeros_like(z), z], -1) on both sides"
        )
    return vocab_size


def _check_labels(labels: Tensor | None, student: Tensor, columns: int, options: _Options) -> None:
    if labels is None:
        if options.label_weight is not None:
            raise ValueError(f"label_weight={options.label_weight} was given without labels")
        if options.label_smoothing:
            raise ValueError(f"label_smoothing={options.label_smoothing} was given without labels")
        return
    check_tensor("labels", labels, _INT64, "int64 class indices")
    if options.label_weight is None:
        raise ValueError(
            "labels were given without label_weight: loss = label_weight * CE + (1 - label_weight) * T^2 * KL; "
            "0.0 uses labels only to ignore rows"
        )
    _check_rows("labels", labels, student)
    if labels.numel() == 0 or not values_visible(labels):
        return
    low, high = labels.aminmax()
    if low >= 0 and high < columns:
        return
    wrong = (labels != options.ignore_index) & ((labels < 0) | (labels >= columns))
    if wrong.any():
        where = wrong.nonzero()[0]
        raise ValueError(
            f"labels must be in [0, {columns}) or ignore_index ({options.ignore_index}), "
            f"got {int(labels[tuple(where)])} at index {where.tolist()}"
        )


def _check_temperature(temperature: float | Tensor, student: Tensor) -> tuple[float, Tensor | None]:
    if not isinstance(temperature, Tensor):
        return check_number("temperature", temperature, *_TEMPERATURES), None
    t = _row_values("temperature", temperature, student)
    low, high = _TEMPERATURES
    if values_visible(t) and not bool(((t >= low) & (t <= high)).all()):
        wrong = t[~((t >= low) & (t <= high))][0]
        raise ValueError(
            f"temperature must be between {low:g} and {high:g} in every row, got {float(wrong):g}"
        )
    return 1.0, t


def _row_values(name: str, value: Tensor, student: Tensor) -> Tensor:
    """A per-row argument as float32 or float64 ``[...]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype.is_complex or value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a real dense tensor, got {value.dtype}, {value.layout}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but it is a constant of kd_loss: pass {name}.detach()")
    if name == "temperature" and value.dim() == 0:
        value = value.expand(student.shape[:-1])
    _check_rows(name, value, student)
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)


def _check_rows(name: str, value: Tensor, student: Tensor) -> None:
    if value.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading dimensions of student_logits {list(student.shape[:-1])}, "
            f"got {shape(value)}"
        )
    if value.device != student.device:
        raise ValueError(f"{name} is on {value.device}, student_logits on {student.device}")


def _check_num_items(
    num_items: NumItems | None, student: Tensor, labelled: bool, options: _Options
) -> tuple[list[float], Tensor | None]:
    """As constants, or as a tensor of 1 or 2 values on the student's device."""
    if num_items is None:
        return [], None
    if options.reduction in ("sum", "none"):
        raise ValueError(f"num_items replaces a divisor, and reduction={options.reduction!r} has none")
    if isinstance(num_items, Tensor):
        if num_items.dtype.is_complex or num_items.layout is not torch.strided or num_items.is_nested:
            raise TypeError(
                f"num_items must be a real dense tensor, got {num_items.dtype}, {num_items.layout}"
            )
        count = num_items.numel()
        if num_items.device != student.device and num_items.device.type != "cpu":
            raise ValueError(f"num_items is on {num_items.device}, student_logits on {student.device}")
        if values_visible(num_items) and not bool((num_items > 0).all()):
            raise ValueError(f"num_items must be greater than 0, got {num_items.tolist()}")
    else:
        pair = num_items if isinstance(num_items, (tuple, list)) else [num_items]
        count = len(pair)
    if count not in (1, 2):
        raise ValueError(f"num_items must be one number or a pair, got {count} values")
    if count == 2 and not (labelled and options.distill_ignored):
        raise ValueError(
            "num_items is a pair (rows, labelled rows) only with labels and ignored_rows='distill'"
        )
    if isinstance(num_items, Tensor):
        dtype = num_items.dtype if num_items.dtype == torch.float32 else torch.float64
        if student.device.type == "mps":
            dtype = torch.float32
        return [], num_items.detach().to(student.device, dtype, non_blocking=True)
    return [check_number("num_items", n, 0, open_low=True) for n in pair], None


def _check_inplace(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the tensor to overwrite: the logits, or what they are a view of as a whole."""
    memory = student
    if student._is_view():
        # nn.Linear with a bias returns a view of its [rows, V] result, and people write .view(batch, length, V).
        base = student._base
        assert base is not None
        if base.numel() != student.numel() or not (base.is_contiguous() and student.is_contiguous()):
            raise ValueError(
                "inplace=True cannot take a view of a part of another tensor: pass the whole [..., V] logits (any "
                "leading dimensions are taken; shift labels rather than logits)"
            )
        memory = base
    if memory.is_leaf or student.is_leaf:
        raise ValueError("inplace=True would overwrite student_logits, which is a leaf that requires grad")
    if memory.retains_grad or student.retains_grad:
        raise ValueError(
            "inplace=True cannot be used after student_logits.retain_grad(): the logits become the gradient"
        )
    if overlaps_itself(student):
        raise ValueError(
            "inplace=True cannot overwrite student_logits: its elements overlap in memory (expanded?)"
        )
    if student.numel() and student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr():
        raise ValueError("inplace=True cannot overwrite student_logits: teacher_logits shares its memory")
    return memory
