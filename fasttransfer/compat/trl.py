"""TRL's ``generalized_jsd_loss``."""

from __future__ import annotations

from torch import Tensor

from fasttransfer.checks import check_choice, check_flag, check_number, values_visible
from fasttransfer.compat.elements import counted_rows, jsd_elements, log_softmax
from fasttransfer.kd import kd_loss
from fasttransfer.kd_arguments import TEMPERATURES, check_logits

_REDUCTIONS = ("batchmean", "sum", "mean", "none")
_IGNORED = -100
_LEAST_PROBABILITY = 1e-8


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | float | Tensor | None = None,
    *,
    logits_are_probs: bool = False,
) -> Tensor:
    """The generalized JSD of TRL's ``GKDTrainer``, ``DistillationTrainer`` and, by keyword, ``GOLDTrainer``.

    TRL 1.10.0.dev0, commit f2cd57710 (2026-07-24). Per row ``beta KL(teacher || m) + (1-beta) KL(student || m)`` with
    ``m = beta teacher + (1-beta) student``; beta 0 is ``KL(teacher || student)``, beta 1 ``KL(student || teacher)``,
    which are not the limits of the others (those vanish). No ``T^2``.

    Args:
        student_logits: ``[batch, length, V]``.
        teacher_logits: The same shape.
        labels: ``[batch, length]``; rows labelled -100 do not count. Nothing else is asked of them.
        beta: The teacher's share in [0, 1].
        temperature: Divides both logits.
        reduction: ``"batchmean"``: the sum divided by the number of counted rows, *without* labels by the batch size
            (not by batch times length). ``"mean"``: over elements, so divided by V as well. ``"sum"``. ``"none"``:
            per element, ``[counted rows, V]`` with labels, else of the logits' shape, by autograd.
        num_items_in_batch: Replaces the divisor, whatever the reduction.
        logits_are_probs: As in ``GOLDTrainer``, where it stands before ``num_items_in_batch``: both sides are
            probabilities, at least 1e-8 and not normalised; the temperature is not used. By autograd, without a kernel.

    Not as in TRL: an unknown reduction is an error (there it is ``"none"``), as is ``num_items_in_batch=0``.

    Raises:
        TypeError, ValueError: As ``fasttransfer.kd_loss``.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    beta = check_number("beta", beta, 0, 1)
    temperature = check_number("temperature", temperature, *TEMPERATURES)
    check_flag("logits_are_probs", logits_are_probs)
    columns = check_logits(student_logits, teacher_logits, None)
    mask = None if labels is None else counted_rows(labels, student_logits, _IGNORED)
    _check_items(num_items_in_batch)
    if logits_are_probs or (reduction == "none" and num_items_in_batch is None):
        if logits_are_probs:
            x, y = (p.clamp_min(_LEAST_PROBABILITY).log() for p in (student_logits, teacher_logits))
        else:
            x, y = (log_softmax(z, temperature) for z in (student_logits, teacher_logits))
        elements = jsd_elements(x, y, beta)
        return _reduced(elements, mask, reduction, num_items_in_batch)

    items: int | float | Tensor | None = num_items_in_batch
    if items is None and reduction == "mean":
        rows = max(student_logits.shape[:-1].numel(), 1) if mask is None else mask.sum().clamp_min(1)
        items = rows * columns
    # Without labels batchmean's divisor is the first dimension; with them it is the counted rows, which is "mean".
    plain = reduction if items is None and mask is None else "sum" if reduction == "sum" else "mean"
    if items is not None:
        plain = "mean"
    return kd_loss(
        student_logits, teacher_logits, temperature=temperature, row_weight=mask, reduction=plain, num_items=items,
        scale_by_t2=False, divergence="jsd", jsd_beta=beta,
    )  # fmt: skip


def _check_items(items: int | float | Tensor | None) -> None:
    if not isinstance(items, Tensor):
        if items is not None:
            check_number("num_items_in_batch", items, 0, open_low=True)
    elif items.numel() != 1:
        raise ValueError(f"num_items_in_batch must be one number, got {items.numel()} values")
    elif values_visible(items) and not bool(items > 0):
        raise ValueError(f"num_items_in_batch must be greater than 0, got {items.item()}")


def _reduced(
    elements: Tensor, mask: Tensor | None, reduction: str, items: int | float | Tensor | None
) -> Tensor:
    """As TRL reduces ``[..., V]``, without its 0/0."""
    first = max(elements.shape[0], 1)
    if mask is not None:
        elements = elements[mask]
    if items is not None:
        return elements.sum() / (items.to(elements.device) if isinstance(items, Tensor) else items)
    if reduction == "batchmean":
        return elements.sum() / (first if mask is None else mask.sum().clamp_min(1))
    if reduction == "mean":
        return elements.sum() / max(elements.numel(), 1)
    return elements.sum() if reduction == "sum" else elements
