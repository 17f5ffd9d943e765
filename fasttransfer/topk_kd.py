"""Distillation from the k largest of the teacher's outputs: ``topk_kd_loss`` and ``TopKKDLoss``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fasttransfer.checks import (
    check_choice,
    check_number,
    check_tensor,
    hides_gradient,
    shape,
    values_visible,
)
from fasttransfer.kd_arguments import (
    TEMPERATURES,
    NumItems,
    Options,
    check_inplace,
    check_labels,
    check_num_items,
    check_options,
    check_temperature,
    row_values,
)
from fasttransfer.ops.topk_kd import TopKFunction, TopKInplaceFunction, topk_kd_op

_FORMS = ("logits", "log_probs")
_TAILS = ("renormalize", "zero", "bucket")
_INDICES = (torch.int32, torch.int64)
# A log-probability above this is no rounding error.
_MOST_LOG_PROB = 1e-3


def topk_kd_loss(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_form: str = "logits",
    tail: str = "renormalize",
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
    r"""Distillation loss from k teacher outputs per row: forward KL over them, the student normalised over all columns.

    Per row, with ``p = softmax(student/T)`` over all V columns, ``K`` the columns that the teacher names and ``q_v``
    its mass in column v::

        loss = label_weight * CE(student, label) + (1 - label_weight) * T^2 * D
        D    = sum_K q_v (log q_v - log p_v)  [+ q_rest (log q_rest - log p_rest) for tail="bucket"]

    The student is read once; nothing of size V exists for the teacher. The gradient is computed in the forward pass.

    Args:
        student_logits: ``[..., V]``, float32, bfloat16, float16 or float64, of any strides.
        teacher_values: ``[..., k]``, any of these dtypes, k >= 1. A constant.
        teacher_indices: ``[..., k]`` int32 or int64: the columns of the values, in any order. An entry does not exist
            if its index is -1 (padding), if its value is -inf, or if its index has an entry further left in the
            row: a value is a property of its column, so of repeated indices the first counts, and masses are not added.
        labels: ``[...]`` int64 class indices, or None. A label need not be among the indices.
        teacher_form: ``"logits"``, or ``"log_probs"``: logarithms of the full softmax over V at temperature 1 (what
            ``top_k_log_probs`` and inference servers give).
        tail: What becomes of the teacher's mass outside of K.

            ``"renormalize"``: ``q = softmax(values/T)`` over K, which is the same for both forms.

            ``"zero"``: ``q = exp(values)``; what is missing from 1 contributes nothing. D is then a part of a KL and
            may be negative.

            ``"bucket"``: the columns outside of K are one outcome, of mass ``q_rest = max(0, 1 - sum_K q)`` for the
            teacher (0 where K is every column; no more exact than the values are) and ``p_rest = sum of p outside of
            K`` for the student, which is summed as such and exact however small it is. D is a KL, at most that of
            ``kd_loss``.

            ``"zero"`` and ``"bucket"`` need ``teacher_form="log_probs"`` and ``temperature=1``: the mass of k values
            at another temperature depends on all the others.
        temperature: As in ``kd_loss``; for ``"renormalize"`` a number, or one per row.
        label_weight: As in ``kd_loss``, and so are ``ignore_index``, ``ignored_rows``, ``label_smoothing``,
            ``row_weight``, ``reduction``, ``num_items``, ``scale_by_t2`` and ``inplace``.
        ignore_index: Label of an ignored row.
        ignored_rows: ``"skip"`` or ``"distill"``.
        label_smoothing: In [0, 1].
        row_weight: ``[...]`` weight per row.
        vocab_size: Only the first ``vocab_size`` columns of the student count.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``.
        num_items: Replaces the divisor.
        scale_by_t2: Multiply the distillation term by ``T^2``.
        inplace: Overwrite ``student_logits`` with its gradient.

    Returns:
        A float32 tensor (float64 if either input is): a scalar, or ``[...]`` for ``reduction="none"``.

    Special values: as in ``kd_loss``. A student logit of -inf costs +inf where the teacher has mass (for the bucket:
    if all columns outside of K are -inf and ``q_rest > 0``), and the gradient stays finite. A NaN or +inf that is
    read, or a student row of -inf throughout, makes the row NaN; so does a row without a single entry under
    ``"renormalize"`` (there is nothing to normalise: exclude it by its label or its weight). Under ``"bucket"`` such a
    row costs 0.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: As ``kd_loss``; in a row that counts, an index that is neither -1 nor in [0, V), or a
            log-probability above 0 (checked on the CPU; on other devices only under ``FASTTRANSFER_CHECK=1``, and
            without it such an index makes its row NaN); a tail that cannot be had at this form or temperature.
        RuntimeError: In backward, under ``create_graph=True``.

    Example:
        >>> values, indices = top_k_log_probs(teacher(x), 64)
        >>> loss = topk_kd_loss(student(x), values, indices, teacher_form="log_probs", tail="bucket")
    """
    options = check_options(
        label_weight, ignore_index, ignored_rows, label_smoothing, vocab_size, reduction, scale_by_t2, inplace
    )
    return _topk(
        student_logits, teacher_values, teacher_indices, labels, _check_tail(teacher_form, tail), temperature,
        row_weight, num_items, options,
    )  # fmt: skip


class TopKKDLoss(nn.Module):
    """``topk_kd_loss`` as a module: the options once, the tensors per batch.

    Args:
        teacher_form: As in ``topk_kd_loss``.
        tail: As in ``topk_kd_loss``.
        temperature: As in ``topk_kd_loss``; a number here, which a call may replace.
        label_weight: As in ``topk_kd_loss``. If given, every call takes labels.
        ignore_index: As in ``topk_kd_loss``.
        ignored_rows: As in ``topk_kd_loss``.
        label_smoothing: As in ``topk_kd_loss``.
        vocab_size: As in ``topk_kd_loss``.
        reduction: As in ``topk_kd_loss``.
        scale_by_t2: As in ``topk_kd_loss``.
        inplace: As in ``topk_kd_loss``.

    Raises:
        TypeError, ValueError: As ``topk_kd_loss``, at construction for the options given here.

    Example:
        >>> criterion = TopKKDLoss(teacher_form="log_probs", tail="bucket")
        >>> loss = criterion(student(x), values, indices)
    """

    def __init__(
        self,
        *,
        teacher_form: str = "logits",
        tail: str = "renormalize",
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
        self.form, self.tail = _check_tail(teacher_form, tail)
        self.temperature = check_number("temperature", temperature, *TEMPERATURES)
        _check_mass(self.form, self.tail, self.temperature)
        self.options = check_options(
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
        teacher_values: Tensor,
        teacher_indices: Tensor,
        labels: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        num_items: NumItems | None = None,
    ) -> Tensor:
        """The loss of one batch; arguments as in ``topk_kd_loss``, ``temperature=None`` meaning the module's."""
        if temperature is None:
            temperature = self.temperature
        return _topk(
            student_logits, teacher_values, teacher_indices, labels, (self.form, self.tail), temperature, row_weight,
            num_items, self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The teacher's form, the tail, the temperature and every option that differs from its default."""
        shown: dict[str, object] = {
            "teacher_form": self.form,
            "tail": self.tail,
            "temperature": self.temperature,
        }
        defaults = Options(None, -100, False, 0.0, None, "mean", True, False)
        given = zip(self.options._fields, self.options, defaults, strict=True)
        shown.update((name, value) for name, value, default in given if value != default)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _topk(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    teacher: tuple[str, str],  # form, tail
    temperature: float | Tensor,
    row_weight: Tensor | None,
    num_items: NumItems | None,
    options: Options,
) -> Tensor:
    """Check what a batch brings, then run."""
    columns = _check_tensors(student, values, indices, options.vocab_size)
    check_labels(labels, student, columns, options)
    constant_t, row_t = check_temperature(temperature, student)
    form, tail = teacher
    _check_mass(form, tail, constant_t if row_t is None else None)
    weight = None if row_weight is None else row_values("row_weight", row_weight, student)
    items, items_tensor = check_num_items(num_items, student, labels is not None, options)
    if options.reduction == "batchmean" and student.dim() == 1:
        raise ValueError(
            "reduction='batchmean' needs student_logits with a first dimension beside V, got one row [V]"
        )
    if values_visible(values) and values_visible(indices):
        _check_entries(values, indices, columns, form, labels, weight, options)
    args = (
        labels, weight, row_t, items_tensor, items, constant_t, options.label_weight or 0.0, options.label_smoothing,
        options.ignore_index, options.distill_ignored, columns, options.reduction, options.scale_by_t2, tail,
    )  # fmt: skip

    recording = torch.is_grad_enabled()
    if recording and values.requires_grad:
        raise ValueError(
            "teacher_values requires grad, but the teacher is a constant of topk_kd_loss: "
            "compute it under torch.no_grad() or pass teacher_values.detach()"
        )
    if not (recording and student.requires_grad) and not hides_gradient((student,)):
        return topk_kd_op(student, values, indices, *args, False)[0]
    # Under torch.compile the compiler plans the memory: an op that mutates would only be made functional again.
    if options.inplace and student.requires_grad and not torch.compiler.is_compiling():
        if values.numel() and student.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
            raise ValueError("inplace=True cannot overwrite student_logits: teacher_values shares its memory")
        memory = check_inplace(student, indices)
        return TopKInplaceFunction.apply(memory, student.shape, values, indices, args)[0]
    return TopKFunction.apply(student, values, indices, args)


def _check_tail(form: str, tail: str) -> tuple[str, str]:
    form, tail = check_choice("teacher_form", form, _FORMS), check_choice("tail", tail, _TAILS)
    _check_mass(form, tail, 1.0)
    return form, tail


def _check_mass(form: str, tail: str, temperature: float | None) -> None:
    """Whether the teacher's mass in K is known; a temperature of None is one per row."""
    if tail == "renormalize":
        return
    if form == "logits":
        raise ValueError(
            f"tail={tail!r} needs teacher_form='log_probs': without the sum over all columns, k logits do not say how "
            "much mass they have"
        )
    if temperature != 1:
        given = "one per row" if temperature is None else f"{temperature:g}"
        raise ValueError(
            f"tail={tail!r} needs the number temperature=1, got {given}: the mass of k log-probabilities at another "
            "temperature depends on all the others. tail='renormalize' takes any"
        )


def _check_tensors(student: Tensor, values: Tensor, indices: Tensor, vocab_size: int | None) -> int:
    """Return how many columns count."""
    check_tensor("student_logits", student)
    check_tensor("teacher_values", values)
    check_tensor("teacher_indices", indices, _INDICES, "int32 or int64")
    for name, tensor in (("teacher_values", values), ("teacher_indices", indices)):
        if tensor.device != student.device:
            raise ValueError(f"{name} is on {tensor.device}, student_logits on {student.device}")
    if student.dim() == 0 or values.shape[:-1] != student.shape[:-1] or values.shape != indices.shape:
        raise ValueError(
            "teacher_values and teacher_indices must be [..., k] with the leading dimensions of student_logits "
            f"[..., V], got {shape(values)} and {shape(indices)} for {shape(student)}"
        )
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(f"teacher_values must have k >= 1 entries per row, got {shape(values)}")
    width = student.shape[-1]
    if vocab_size is None:
        vocab_size = width
    elif not 0 < vocab_size <= width:
        raise ValueError(
            f"vocab_size must be between 2 and {width}, the columns of student_logits, got {vocab_size}"
        )
    if vocab_size < 2:
        raise ValueError(
            f"softmax over {vocab_size} column(s) says nothing: student_logits must have 2 or more"
        )
    return vocab_size


def _check_entries(
    values: Tensor,
    indices: Tensor,
    columns: int,
    form: str,
    labels: Tensor | None,
    weight: Tensor | None,
    options: Options,
) -> None:
    """Indices in range, log-probabilities at most 0, in the rows that count."""
    if indices.numel() == 0:
        return
    low, high = indices.aminmax()
    wrong_index = bool(low < -1) or bool(high >= columns)
    if not wrong_index and (form == "logits" or not bool(values.max() > _MOST_LOG_PROB)):
        return  # NaN is not greater, and is the kernel's business
    counted = torch.ones(indices.shape[:-1], dtype=torch.bool, device=indices.device)
    if weight is not None:
        counted &= weight != 0
    if labels is not None and not options.distill_ignored:
        counted &= labels != options.ignore_index
    wrong = counted[..., None] & ((indices < -1) | (indices >= columns))
    if wrong.any():
        where = wrong.nonzero()[0]
        raise ValueError(
            f"teacher_indices must be in [0, {columns}), or -1 for padding, got {int(indices[tuple(where)])} at index "
            f"{where.tolist()}"
        )
    wrong = counted[..., None] & (indices >= 0) & (values > _MOST_LOG_PROB)
    if form == "log_probs" and wrong.any():
        where = wrong.nonzero()[0]
        raise ValueError(
            f"teacher_values must be at most 0 with teacher_form='log_probs', got {float(values[tuple(where)]):g} at "
            f"index {where.tolist()}: are these logits?"
        )
