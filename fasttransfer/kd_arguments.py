"""Arguments of the distillation losses: what is checked once, what every batch brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer.checks import (
    check_choice,
    check_flag,
    check_group,
    check_index,
    check_number,
    check_tensor,
    shape,
    values_visible,
)
from fasttransfer.memory import overlaps_itself

NumItems = int | float | Tensor | Sequence[float]

# Beyond, it leaves the range of float32.
_LARGEST_CAP = 1e30
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
_REDUCTIONS = ("mean", "batchmean", "sum", "none")
_IGNORED_ROWS = ("skip", "distill")
_INT64 = (torch.int64,)
# Beyond, T^2 and 1/T leave the range of their types.
TEMPERATURES = (1e-30, 1e30)


class Options(NamedTuple):
    """What does not change from batch to batch, checked."""

    label_weight: float | None
    ignore_index: int
    distill_ignored: bool
    label_smoothing: float
    vocab_size: int | None
    reduction: str
    scale_by_t2: bool
    inplace: bool
    divergence: str = "forward_kl"
    divergence_args: tuple[float, ...] = ()
    standardize: bool = False
    softcap: tuple[float, float] = (0.0, 0.0)  # student, teacher; 0: none
    return_stats: bool = False
    group: Any = None  # a ProcessGroup whose ranks hold the columns

    @property
    def plain(self) -> bool:
        """Whether ``torch.ops.fasttransfer.kd`` computes it; else ``distill``."""
        return self[8:] == _PLAIN


_PLAIN = ("forward_kl", (), False, (0.0, 0.0), False, None)

_BINARY = (
    "A binary head with one logit z is the two logits [0, z]: pass torch.cat([torch.zeros_like(z), z], -1) on both "
    "sides"
)


def check_options(
    label_weight: float | None,
    ignore_index: int,
    ignored_rows: str,
    label_smoothing: float,
    vocab_size: int | None,
    reduction: str,
    scale_by_t2: bool,
    inplace: bool,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    standardize: bool = False,
    softcap: float | Sequence[float | None] | None = None,
    return_stats: bool = False,
    group: Any = None,
) -> Options:
    """The options of ``kd_loss``, or what is wrong with them."""
    if label_weight is not None:
        label_weight = check_number("label_weight", label_weight, 0, 1)
    check_index("ignore_index", ignore_index)
    if vocab_size is not None and (
        isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt))
    ):
        raise TypeError(f"vocab_size must be an int or None, got {vocab_size!r}")
    if isinstance(vocab_size, int) and vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}: {_BINARY}")
    check_group(group, inplace)
    return Options(
        label_weight,
        ignore_index,
        check_choice("ignored_rows", ignored_rows, _IGNORED_ROWS) == "distill",
        check_number("label_smoothing", label_smoothing, 0, 1),
        vocab_size,
        check_choice("reduction", reduction, _REDUCTIONS),
        check_flag("scale_by_t2", scale_by_t2),
        check_flag("inplace", inplace),
        *_check_divergence(divergence, jsd_beta),
        check_flag("standardize", standardize),
        _check_softcap(softcap),
        check_flag("return_stats", return_stats),
        group,
    )


def _check_divergence(divergence: str, jsd_beta: float) -> tuple[str, tuple[float, ...]]:
    beta = check_number("jsd_beta", jsd_beta, 0, 1)
    if check_choice("divergence", divergence, DIVERGENCES) != "jsd":
        if beta != 0.5:
            raise ValueError(
                f"jsd_beta={jsd_beta} was given for divergence={divergence!r}: it is of 'jsd' only"
            )
        return divergence, ()
    # At its ends the mixture is one of the two, and the term that is left is a KL.
    return {0.0: ("forward_kl", ()), 1.0: ("reverse_kl", ())}.get(beta, ("jsd", (beta,)))


def _check_softcap(softcap: float | Sequence[float | None] | None) -> tuple[float, float]:
    pair = softcap if isinstance(softcap, (tuple, list)) else (softcap, softcap)
    if len(pair) != 2:
        raise ValueError(
            f"softcap must be a number, None or a pair (student's, teacher's), got {len(pair)} values"
        )
    caps = [0.0 if cap is None else check_number("softcap", cap, 0, open_low=True) for cap in pair]
    if max(caps) > _LARGEST_CAP:
        raise ValueError(f"softcap must be at most {_LARGEST_CAP:g}, got {max(caps):g}")
    return caps[0], caps[1]


def check_logits(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
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
    return check_columns(student.shape[-1], teacher.shape[-1], vocab_size)


def check_columns(
    width: int,
    teacher_width: int,
    vocab_size: int | None,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
) -> int:
    """Return how many of the sides' columns count."""
    if vocab_size is None:
        if width != teacher_width:
            raise ValueError(
                f"{names[0]} has {width} columns and {names[1]} {teacher_width}: if the vocabularies agree "
                "on the first columns and the rest is padding, pass vocab_size="
            )
        vocab_size = width
    elif not vocab_size <= min(width, teacher_width):
        raise ValueError(
            f"vocab_size must be between 2 and the smaller width, got {vocab_size} for {width} columns of "
            f"{names[0]} and {teacher_width} of {names[1]}"
        )
    if vocab_size < 2:
        raise ValueError(f"softmax over {vocab_size} column(s) says nothing. {_BINARY}")
    return vocab_size


def check_labels(labels: Tensor | None, student: Tensor, columns: int, options: Options) -> None:
    """Shape, dtype and, where they may be looked at, range."""
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
    check_rows("labels", labels, student)
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


def check_temperature(temperature: float | Tensor, student: Tensor) -> tuple[float, Tensor | None]:
    """As a constant, or as one value per row."""
    if not isinstance(temperature, Tensor):
        return check_number("temperature", temperature, *TEMPERATURES), None
    t = row_values("temperature", temperature, student)
    low, high = TEMPERATURES
    if values_visible(t) and not bool(((t >= low) & (t <= high)).all()):
        wrong = t[~((t >= low) & (t <= high))][0]
        raise ValueError(
            f"temperature must be between {low:g} and {high:g} in every row, got {float(wrong):g}"
        )
    return 1.0, t


def row_values(name: str, value: Tensor, student: Tensor) -> Tensor:
    """A per-row argument as float32 or float64 ``[...]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype.is_complex or value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a real dense tensor, got {value.dtype}, {value.layout}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but it is a constant of the loss: pass {name}.detach()")
    if name == "temperature" and value.dim() == 0:
        value = value.expand(student.shape[:-1])
    check_rows(name, value, student)
    return value if value.dtype in (torch.float32, torch.float64) else value.to(torch.float32)


def check_rows(name: str, value: Tensor, student: Tensor) -> None:
    """One value per row, on the logits' device."""
    if value.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have one value per row, so the shape {list(student.shape[:-1])}, got {shape(value)}"
        )
    if value.device != student.device:
        raise ValueError(f"{name} is on {value.device}, the student on {student.device}")


def check_batch(
    student: Tensor,  # [..., any]: logits, or what they are made of
    columns: int,
    labels: Tensor | None,
    temperature: float | Tensor,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    options: Options,
) -> tuple[Any, ...]:
    """What a batch brings beside the two sides: the row options of ``torch.ops.fasttransfer.kd``."""
    check_labels(labels, student, columns, options)
    constant_t, row_t = check_temperature(temperature, student)
    weight = None if row_weight is None else row_values("row_weight", row_weight, student)
    items, items_tensor = check_num_items(num_items, student, labels is not None, options)
    if options.reduction == "batchmean" and student.dim() == 1:
        raise ValueError("reduction='batchmean' needs a first dimension beside the last, got one row")
    return (
        labels, weight, row_t, items_tensor, items, constant_t, options.label_weight or 0.0, options.label_smoothing,
        options.ignore_index, options.distill_ignored, columns, options.reduction, options.scale_by_t2,
    )  # fmt: skip


def check_num_items(
    num_items: NumItems | None, student: Tensor, labelled: bool, options: Options
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
            raise ValueError(f"num_items is on {num_items.device}, the student on {student.device}")
        # 0: the count of a batch in which nothing counts.
        if values_visible(num_items) and not bool((num_items >= 0).all()):
            raise ValueError(f"num_items must be at least 0, got {num_items.tolist()}")
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


def check_inplace(student: Tensor, teacher: Tensor) -> Tensor:
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
