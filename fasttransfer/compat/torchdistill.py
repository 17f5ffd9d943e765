"""torchdistill's ``KDLoss`` and ``LogitStdKDLoss``: ``torchdistill.losses.mid_level``.

torchdistill 1.1.5-dev, commit 3e4373c (2026-07-01). To use them from its YAML, register them:
``register_mid_level_loss(KDLoss)``. ``LogitsKDLoss`` is the same on logits, without the paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_choice, check_index, check_number, check_tensor
from fasttransfer.compat.elements import check_same_classes
from fasttransfer.compat.functional import kl_div_with_logits
from fasttransfer.kd import kd_loss
from fasttransfer.kd_arguments import TEMPERATURES

_REDUCTIONS = ("batchmean", "sum", "mean", "none")
_EPS = 1e-7  # of the kernels' standardization


class LogitsKDLoss(nn.Module):
    """``alpha CE + beta T^2 KL``; without targets, or with alpha None or 0, the KL alone, *without* beta and ``T^2``.

    With ``reduction="batchmean"`` the KL's sum is divided by the batch size and CE is its mean over the targets that
    are not ``ignore_index``; ignored rows are distilled all the same. ``"mean"`` divides the KL by rows times classes
    (``F.kl_div``), CE by the targets; ``"sum"`` neither.

    Not as in torchdistill: alpha None without beta is an error there at construction (1 - None) although it is the
    default; with targets, ``reduction="none"`` is an error here (there the two shapes do not go together).

    Args:
        temperature: T.
        alpha: Weight of the cross entropy, at least 0, or None.
        beta: Weight of the KL, at least 0; ``1 - alpha`` if None.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"none"`` (per element).
        ignore_index: Of the cross entropy.
        label_smoothing: Of the cross entropy.

    Raises:
        TypeError, ValueError: As ``fasttransfer.kd_loss``.
    """

    standardize = False

    def __init__(
        self,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, *TEMPERATURES)
        self.reduction = check_choice("reduction", reduction, _REDUCTIONS)
        self.alpha = None if alpha is None else check_number("alpha", alpha, 0)
        if beta is None:
            beta = 1.0 if self.alpha is None else 1 - self.alpha
        self.beta = check_number("beta", beta, 0)
        self.ignore_index = check_index("ignore_index", ignore_index)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """Of logits ``[batch, classes]`` or ``[batch, classes, ...]`` and targets without the classes' dimension."""
        check_tensor("student_logits", student_logits)
        check_tensor("teacher_logits", teacher_logits)
        check_same_classes("student_logits", student_logits, "teacher_logits", teacher_logits)
        student, teacher = student_logits.movedim(1, -1), teacher_logits.movedim(1, -1)
        if self.standardize and student.dim() != 2:
            raise ValueError("standardized logits must be [batch, classes]")
        if not self.alpha or targets is None:
            return self._soft(student, teacher, student_logits, teacher_logits)
        check_tensor("targets", targets, (torch.int64,), "int64")
        if self.reduction == "none":
            raise ValueError(
                "reduction='none' has no sum of a KL per element and a cross entropy per target: use another reduction"
            )
        total = self.alpha + self.beta
        loss: Tensor = kd_loss(
            student, teacher, targets, temperature=self.temperature, label_weight=self.alpha / total,
            ignore_index=self.ignore_index, ignored_rows="distill", label_smoothing=self.label_smoothing,
            reduction="sum" if self.reduction == "sum" else "mean", num_items=self._divisors(student, targets),
            standardize=self.standardize,
        )  # fmt: skip
        return loss if total == 1 else total * loss

    def _soft(self, student: Tensor, teacher: Tensor, student_raw: Tensor, teacher_raw: Tensor) -> Tensor:
        if self.reduction == "none" and self.standardize:
            student_raw, teacher_raw = (
                (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + _EPS)
                for z in (student_raw, teacher_raw)
            )
        if self.reduction == "none":
            return kl_div_with_logits(student_raw, teacher_raw, "none", temperature=self.temperature, dim=1)
        loss: Tensor = kd_loss(
            student, teacher, temperature=self.temperature, scale_by_t2=False, standardize=self.standardize,
            reduction="sum" if self.reduction == "sum" else "mean", num_items=self._divisors(student, None),
        )  # fmt: skip
        return loss

    def _divisors(self, student: Tensor, targets: Tensor | None) -> Any:
        """Of the KL, and with targets of the cross entropy too."""
        if self.reduction == "sum":
            return None
        rows = max(student.shape[0] if self.reduction == "batchmean" else student.numel(), 1)
        if targets is None:
            return rows
        labelled = (targets != self.ignore_index).sum().clamp_min(1)
        return torch.stack([torch.full_like(labelled, rows), labelled])


class KDLoss(LogitsKDLoss):
    """``LogitsKDLoss`` of what the forward hooks of two models have recorded.

    Args:
        student_module_path: Key of the student's dictionary.
        student_module_io: ``"input"`` or ``"output"``.
        teacher_module_path: Key of the teacher's dictionary.
        teacher_module_io: ``"input"`` or ``"output"``.
        temperature: As in ``LogitsKDLoss``, and so are ``alpha``, ``beta`` and ``reduction``.
        alpha: Weight of the cross entropy.
        beta: Weight of the KL.
        reduction: See ``LogitsKDLoss``.
        kwargs: ``ignore_index`` and ``label_smoothing`` of the cross entropy. (``weight`` is not supported.)

    Raises:
        TypeError, ValueError: As ``LogitsKDLoss``.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature, alpha, beta, reduction, **kwargs)
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io

    def forward(  # type: ignore[override]
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Of the two dictionaries, module path to ``{"input": ..., "output": ...}``; other arguments are not used."""
        return super().forward(
            _recorded("student", student_io_dict, self.student_module_path, self.student_module_io),
            _recorded("teacher", teacher_io_dict, self.teacher_module_path, self.teacher_module_io),
            targets,
        )


def _recorded(side: str, io_dict: Mapping[str, Mapping[str, Tensor]], path: str, io: str) -> Tensor:
    if path not in io_dict:
        raise ValueError(f"{side}_module_path {path!r} is not in {side}_io_dict, which has {sorted(io_dict)}")
    if io not in io_dict[path]:
        raise ValueError(
            f"{side}_module_io {io!r} was not recorded for {path!r}, which has {sorted(io_dict[path])}"
        )
    return io_dict[path][io]


class LogitStdKDLoss(KDLoss):
    """``KDLoss`` of standardized logits (the cross entropy's are not), by ``std`` with classes - 1.

    Args:
        student_module_path: As in ``KDLoss``, and so are the next six.
        student_module_io: See ``KDLoss``.
        teacher_module_path: See ``KDLoss``.
        teacher_module_io: See ``KDLoss``.
        temperature: See ``KDLoss``.
        eps: Added to the deviation; 1e-7, which is all that the kernels have.
        alpha: See ``KDLoss``.
        beta: See ``KDLoss``.
        reduction: See ``KDLoss``.
        kwargs: See ``KDLoss``.

    Raises:
        ValueError: Another ``eps``; otherwise as ``KDLoss``.
    """

    standardize = True

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = _EPS,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        if eps != _EPS:
            raise ValueError(f"eps must be {_EPS}, got {eps}")
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io, temperature, alpha, beta,
            reduction, **kwargs,
        )  # fmt: skip
