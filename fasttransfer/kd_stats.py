"""What ``return_stats=True`` of the distillation losses returns beside the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttransfer.kd_arguments import Options


class KDStats(NamedTuple):
    """Of one call: detached tensors on the logits' device, in nats where they have a unit.

    Means over the counted rows by their ``row_weight`` (NaN if there is none), or ``[...]`` with
    ``reduction="none"``, 0 in rows that are not counted.
    """

    loss: Tensor
    """The loss, as returned beside this."""
    kl: Tensor
    """KL(q || p) at the temperature, without T^2 or a weight, whatever the divergence of the loss."""
    ce: Tensor
    """Cross entropy of the label at temperature 1, unsmoothed; over the labelled rows."""
    student_entropy: Tensor
    """Of the student's softmax at the temperature."""
    teacher_entropy: Tensor
    """Of the teacher's."""
    agreement: Tensor
    """Share of rows in which student and teacher have the same first maximum (top-1 agreement)."""


def kd_stats(
    loss: Tensor,  # [] or [...]
    rows: Tensor,  # [rows, 5], as torch.ops.fasttransfer.distill returns them
    labels: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
) -> KDStats:
    """The rows' statistics as ``options`` reduces them."""
    rows, loss = rows.detach(), loss.detach()
    if options.reduction == "none":
        return KDStats(loss, *(column.reshape(loss.shape) for column in rows.unbind(-1)))
    weight = torch.ones_like(rows[:, 0]) if row_weight is None else row_weight.reshape(-1).to(rows.dtype)
    labelled = None
    if labels is not None:
        labelled = torch.where(labels.reshape(-1) != options.ignore_index, weight, 0.0)
        if not options.distill_ignored:
            weight = labelled
    kl, ce, *others = (
        torch.where(weight != 0, c, 0.0).mul(weight).sum() / weight.sum() for c in rows.unbind(-1)
    )
    ce = ce * weight.sum() / labelled.sum() if labelled is not None else torch.full_like(kl, torch.nan)
    return KDStats(loss, kl, ce, *others)
