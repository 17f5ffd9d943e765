"""mdistiller's ``kd_loss`` and ``dkd_loss``.

mdistiller at commit a08d46f (2023-11-05), and for ``logit_stand`` its fork by the authors of logit standardization,
sunshangquan/logit-standardization-KD at commit f6e5aa5 (2024-06-24). Means over the batch, times ``T^2``; weights of
the losses (``CE_WEIGHT``, ``KD_WEIGHT``, the warm-up of DKD) are multiplied on by the caller there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttransfer.checks import check_flag, check_tensor, shape
from fasttransfer.compat.elements import check_same_classes
from fasttransfer.decoupled_kd import decoupled_kd_loss
from fasttransfer.kd import kd_loss as _kd_loss


def kd_loss(
    logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False
) -> Tensor:
    """``T^2 KL``, mean over the rows.

    Args:
        logits_student: ``[batch, classes]``, or ``[batch, classes, ...]`` (a mean over all positions).
        logits_teacher: The same shape.
        temperature: T.
        logit_stand: Standardize the logits of each row first; the deviation is divided by classes - 1, plus 1e-7.

    Raises:
        TypeError, ValueError: As ``fasttransfer.kd_loss``; ``logit_stand`` beyond two dimensions.
    """
    check_tensor("logits_student", logits_student)
    check_tensor("logits_teacher", logits_teacher)
    check_same_classes("logits_student", logits_student, "logits_teacher", logits_teacher)
    if check_flag("logit_stand", logit_stand) and logits_student.dim() != 2:
        raise ValueError(f"logit_stand takes logits [batch, classes], got {shape(logits_student)}")
    loss: Tensor = _kd_loss(
        logits_student.movedim(1, -1), logits_teacher.movedim(1, -1), temperature=temperature, standardize=logit_stand
    )  # fmt: skip
    return loss


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """``alpha T^2 TCKD + beta T^2 NCKD``, mean over the rows.

    Where a student's mass on its label or on all others underflows, mdistiller takes the logarithm of 0 (NaN or inf),
    and a logit of more than about 1000 T comes back through its mask; neither happens here. A target of -100, which is
    an error there, leaves its row out here, of the mean as well.

    Args:
        logits_student: ``[batch, classes]``.
        logits_teacher: The same shape.
        target: Class indices, as many as there are rows.
        alpha: Weight of the target class's part.
        beta: Weight of the others' part.
        temperature: T.
        logit_stand: As in ``kd_loss``.

    Raises:
        TypeError, ValueError: As ``fasttransfer.decoupled_kd_loss``.
    """
    check_tensor("logits_student", logits_student)
    if logits_student.dim() != 2:
        raise ValueError(f"logits_student must be [batch, classes], got {shape(logits_student)}")
    check_tensor("target", target, (torch.int64,), "int64")
    loss: Tensor = decoupled_kd_loss(
        logits_student, logits_teacher, target.reshape(-1), temperature=temperature, target_weight=alpha,
        nontarget_weight=beta, standardize=logit_stand,
    )  # fmt: skip
    return loss
