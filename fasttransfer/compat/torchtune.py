"""torchtune's six KL losses: ``torchtune.modules.loss``.

torchtune 0.7.0, commit bd2a0fc7c (2026-04-23). Labels only say which rows count: those that are not ``ignore_index``;
nothing else is asked of them. Temperature 1, no ``T^2``. ``normalize=True`` divides by the number of counted rows.

The conventions that one meets:

- ``ForwardKLLoss`` is the cross entropy ``-sum q log p``, the teacher's entropy above the KL: it does not go to 0. Its
  gradient is the KL's.
- A column in which a logit is infinite is left out of the sums, the student's in the forward loss, either side's in the
  reverse one, also where the other side has mass there: what would cost +inf costs nothing.

Not as in torchtune: the teacher is a constant; where nothing counts the result is 0 with a zero gradient (there a
constant without a graph, or NaN in the reverse and symmetric chunked losses); the reverse loss's gradient where a
logit is -inf is right (there NaN); float64 logits are computed in float64. Looking whether the result is
infinite waits for the device and breaks the graph of ``torch.compile`` once, as torchtune's look at the count does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_count, check_index, check_number, check_tensor, shape
from fasttransfer.compat.elements import counted_rows, log_softmax
from fasttransfer.kd import kd_loss
from fasttransfer.kd_arguments import check_logits

_LABELS = (torch.int64, torch.int32)


class ForwardKLLoss(nn.Module):
    """``-sum q log p`` per row; see the module.

    Args:
        ignore_index: Label of a row that does not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = check_index("ignore_index", ignore_index)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """Of logits ``[..., V]`` and as many labels as there are rows; ``normalize=False``: the sum."""
        return _loss(student_logits, teacher_logits, labels, self.ignore_index, normalize, 1.0)


class ReverseKLLoss(nn.Module):
    """``KL(p || q)`` per row; see the module.

    Args:
        ignore_index: Label of a row that does not count.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = check_index("ignore_index", ignore_index)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """Of logits ``[..., V]`` and as many labels as there are rows; ``normalize=False``: the sum."""
        return _loss(student_logits, teacher_logits, labels, self.ignore_index, normalize, 0.0)


class SymmetricKLLoss(nn.Module):
    """``ratio * ForwardKLLoss + (1 - ratio) * ReverseKLLoss``.

    Args:
        sym_kd_ratio: The share of the forward loss, in [0, 1].
        ignore_index: Label of a row that does not count.

    Raises:
        ValueError: A ratio outside of [0, 1].
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.sym_kd_ratio = check_number("sym_kd_ratio", sym_kd_ratio, 0, 1)
        self.ignore_index = check_index("ignore_index", ignore_index)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True
    ) -> Tensor:
        """Of logits ``[..., V]`` and as many labels as there are rows; ``normalize=False``: the sum."""
        return _loss(student_logits, teacher_logits, labels, self.ignore_index, normalize, self.sym_kd_ratio)


class _Chunked(nn.Module):
    """Of lists of logits ``[batch, part of the length, V]``, as ``tensor_split(num_output_chunks, dim=1)`` gives them.

    The chunks' own lengths decide which labels are theirs (torchtune splits labels by ``tensor_split`` or ``chunk``,
    which differ where the length is no multiple).
    """

    _ratio: float

    def __init__(self, num_output_chunks: int, ignore_index: int) -> None:
        super().__init__()
        self.num_output_chunks = check_count("num_output_chunks", num_output_chunks)
        self.ignore_index = check_index("ignore_index", ignore_index)

    def apply_compile_strategy(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing to do: a chunk's loss is one operation."""
        return self

    def forward(self, student_logits: list[Tensor], teacher_logits: list[Tensor], labels: Tensor) -> Tensor:
        """The loss over all chunks, divided by the counted rows of ``labels`` ``[batch, length]``."""
        check_tensor("labels", labels, _LABELS, "int64 or int32")
        for name, chunks in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if not isinstance(chunks, (list, tuple)) or not chunks:
                raise TypeError(
                    f"{name} must be a list of chunks, got {type(chunks).__name__} {chunks!r:.40}"
                )
            for i, chunk in enumerate(chunks):
                check_tensor(f"{name}[{i}]", chunk)
        if len(student_logits) != len(teacher_logits):
            raise ValueError(
                f"student_logits and teacher_logits must have as many chunks, got {len(student_logits)} and "
                f"{len(teacher_logits)}"
            )
        if labels.dim() != 2:
            raise ValueError(f"labels must be [batch, length], got {shape(labels)}")
        lengths = [chunk.shape[:-1].numel() // max(labels.shape[0], 1) for chunk in student_logits]
        if sum(lengths) != labels.shape[1]:
            raise ValueError(
                f"labels must be [batch, length] with the length of all chunks, got {shape(labels)} for {lengths}"
            )
        counted = (labels != self.ignore_index).sum().clamp_min(1)
        parts = [
            _sums(s, t, part != self.ignore_index, self._ratio, counted)
            for s, t, part in zip(student_logits, teacher_logits, labels.split(lengths, 1), strict=True)
        ]
        return torch.stack(parts).sum()


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """``ForwardKLLoss`` of chunked logits.

    Args:
        num_output_chunks: Not used: there are as many chunks as the call brings.
        ignore_index: Label of a row that does not count.
    """

    _ratio = 1.0

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """``ReverseKLLoss`` of chunked logits.

    Args:
        num_output_chunks: Not used: there are as many chunks as the call brings.
        ignore_index: Label of a row that does not count.
    """

    _ratio = 0.0

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """``SymmetricKLLoss`` of chunked logits.

    Args:
        num_output_chunks: Not used: there are as many chunks as the call brings.
        sym_kd_ratio: The share of the forward loss, in [0, 1].
        ignore_index: Label of a row that does not count.

    Raises:
        ValueError: A ratio outside of [0, 1].
    """

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.sym_kd_ratio = self._ratio = check_number("sym_kd_ratio", sym_kd_ratio, 0, 1)


def _loss(
    student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int, normalize: bool, ratio: float
) -> Tensor:
    check_tensor("student_logits", student)
    mask = counted_rows(labels, student, ignore_index)
    return _sums(student, teacher, mask, ratio, mask.sum().clamp_min(1) if normalize else None)


def _sums(student: Tensor, teacher: Tensor, mask: Tensor, ratio: float, divisor: Tensor | None) -> Tensor:
    """``ratio`` times the forward and ``1 - ratio`` times the reverse loss, summed over a mask, divided."""
    check_logits(student, teacher, None)
    mask = mask.reshape(student.shape[:-1])
    teacher = teacher.detach()
    total = torch.zeros((), device=student.device)
    for share, part in ((ratio, _forward), (1 - ratio, _reverse)):
        if share:
            total = total + share * part(student, teacher, mask, divisor)
    return total


def _forward(student: Tensor, teacher: Tensor, mask: Tensor, divisor: Tensor | None) -> Tensor:
    kl, stats = kd_loss(
        student, teacher, row_weight=mask, reduction="sum" if divisor is None else "mean", num_items=divisor,
        return_stats=True,
    )  # fmt: skip
    count = mask.sum()
    entropy = torch.where(count > 0, stats.teacher_entropy * count, 0.0)  # a mean over none is NaN
    if _is_finite(kl):
        return kl + (entropy if divisor is None else entropy / divisor)
    # By autograd, leaving out the student's infinite columns.
    x = log_softmax(torch.where(mask[..., None], student, 0.0))
    q = log_softmax(torch.where(mask[..., None], teacher, 0.0)).exp()
    rows = -(q * torch.where(student.isinf(), 0.0, x)).sum(-1)
    return _masked(rows, mask, divisor)


def _reverse(student: Tensor, teacher: Tensor, mask: Tensor, divisor: Tensor | None) -> Tensor:
    kl: Tensor = kd_loss(
        student, teacher, row_weight=mask, reduction="sum" if divisor is None else "mean", num_items=divisor,
        divergence="reverse_kl",
    )  # fmt: skip
    if _is_finite(kl):
        return kl
    out = student.isinf() | teacher.isinf()
    x, y = (log_softmax(torch.where(mask[..., None], z, 0.0)) for z in (student, teacher))
    # Masked before the product: the gradient may not meet 0 * inf either.
    rows = (torch.where(out, 0.0, x.exp()) * (torch.where(out, 0.0, x) - torch.where(out, 0.0, y))).sum(-1)
    return _masked(rows, mask, divisor)


def _is_finite(kl: Tensor) -> bool:
    """Whether no counted row has a column that would cost +inf. (NaN is not for masking.)"""
    return not bool(kl == torch.inf)


def _masked(rows: Tensor, mask: Tensor, divisor: Tensor | None) -> Tensor:
    total = torch.where(mask, rows, 0.0).sum()
    return total if divisor is None else total / divisor
