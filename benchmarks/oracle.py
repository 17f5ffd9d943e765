"""What the right answer is: every operation in float64, written from its formula, gradients by hand.

Nothing here calls fasttransfer or autograd, so that an error there cannot hide here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float) -> list[Tensor]:
    """Loss and gradient for the student logits of the mean over rows of `T^2 KL(teacher || student)`."""
    log_p = torch.log_softmax(student.double() / temperature, -1)
    log_q = torch.log_softmax(teacher.double() / temperature, -1)
    q = log_q.exp()
    rows = student.numel() // student.shape[-1]
    loss = temperature**2 * (q * (log_q - log_p)).sum() / rows
    grad = temperature / rows * (log_p.exp() - q)
    return [loss, grad]


def kd_with_labels(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, label_weight: float
) -> list[Tensor]:
    """Loss and gradient of `label_weight * CE + (1 - label_weight) * T^2 KL`, both means over rows."""
    soft_loss, soft_grad = kd(student, teacher, temperature)
    log_p = torch.log_softmax(student.double(), -1)
    rows = torch.arange(student.shape[0])
    hard_loss = -log_p[rows, labels].mean()
    hard_grad = log_p.exp()
    hard_grad[rows, labels] -= 1.0
    hard_grad /= student.shape[0]
    return [
        label_weight * hard_loss + (1.0 - label_weight) * soft_loss,
        label_weight * hard_grad + (1.0 - label_weight) * soft_grad,
    ]


def l2sp(
    params: Sequence[Tensor], start: Sequence[Tensor], grads: Sequence[Tensor], strength: float
) -> list[Tensor]:
    """The penalty, then for each parameter the gradient it had plus the penalty's."""
    distance = [p.double() - p0.double() for p, p0 in zip(params, start, strict=True)]
    penalty = strength * torch.stack([d.square().sum() for d in distance]).sum()
    return [penalty] + [g.double() + 2.0 * strength * d for g, d in zip(grads, distance, strict=True)]


def blend(target: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], alpha: float) -> list[Tensor]:
    """`alpha * target + (1 - alpha) * mean(sources)`, tensor by tensor."""
    share = (1.0 - alpha) / len(sources)
    return [
        alpha * tensors[0].double() + share * torch.stack([s.double() for s in tensors[1:]]).sum(0)
        for tensors in zip(target, *sources, strict=True)
    ]


def relative_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest `||output - exact|| / ||exact||` in a list; infinite for a wrong shape or a NaN."""
    if len(outputs) != len(exact):
        return float("inf")
    worst = 0.0
    for output, truth in zip(outputs, exact, strict=True):
        if output is None or output.shape != truth.shape:
            return float("inf")
        error = float((output.double() - truth).norm() / truth.norm().clamp_min(1e-300))
        if not error <= worst:  # written so that a NaN is not swallowed, as max() would
            worst = error if error == error else float("inf")
    return worst
