"""Divergences per element ``[..., V]``, of log-probabilities, by autograd: where a loss must not be summed over V.

A column without mass on either side is 0 with a gradient of 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasttransfer.checks import shape


def log_softmax(logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """In float32, or float64 for float64 logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim)


def kl_elements(y: Tensor, x: Tensor) -> Tensor:
    """``exp(y) (y - x)``, whose sum over V is KL(y || x)."""
    empty = y == -torch.inf
    # Neither the value nor the gradient may meet 0 * inf.
    difference = torch.where(empty, 0.0, y) - torch.where(empty, 0.0, x)
    return y.exp() * difference


def jsd_elements(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """``beta KL(y || m) + (1-beta) KL(x || m)``, ``m = beta y + (1-beta) x``; at the ends KL(y || x) and KL(x || y)."""
    if beta in (0, 1):
        return kl_elements(y, x) if beta == 0 else kl_elements(x, y)
    neither = (x == -torch.inf) & (y == -torch.inf)
    a, b = torch.where(neither, 0.0, x), torch.where(neither, 0.0, y)
    m = torch.logaddexp(b + math.log(beta), a + math.log1p(-beta))
    return torch.where(neither, 0.0, beta * kl_elements(b, m) + (1 - beta) * kl_elements(a, m))


def counted_rows(labels: Tensor, student: Tensor, ignored: int) -> Tensor:
    """Which rows have another label than ``ignored``; a check of the labels' shape, where only the number counts."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.numel() != student.shape[:-1].numel():
        raise ValueError(
            f"labels must have a label for each row of student_logits {shape(student)}, got {shape(labels)}"
        )
    if labels.device != student.device:
        raise ValueError(f"labels is on {labels.device}, student_logits on {student.device}")
    return labels != ignored


def check_same_classes(
    student_name: str, student: Tensor, teacher_name: str, teacher: Tensor, dim: int = 1
) -> None:
    """Of logits whose classes are in dimension ``dim``: it is there, and both have the same shape."""
    if not -student.dim() <= dim < student.dim():
        raise ValueError(f"{student_name} must have its classes in dimension {dim}, got {shape(student)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"{teacher_name} must have the shape of {student_name}, {shape(student)}, got {shape(teacher)}"
        )
