"""What the distillation losses must be with every option: float64 formulas row by row, their gradients by autograd.

Written so that autograd meets no 0 * inf: what has no mass is left out of a row before logarithms are taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BOTH_ENDS = {0.0: "forward_kl", 1.0: "reverse_kl"}


class Result(NamedTuple):
    loss: Tensor
    student_grad: Tensor  # of the sum of the loss
    teacher_grad: Tensor
    stats: Tensor  # [rows, 5]: kl, ce, student and teacher entropy, agreement


def capped(z: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return z
    finite = z != -math.inf
    return torch.where(finite, cap * torch.tanh(torch.where(finite, z, 0.0) / cap), -math.inf)


def standardized(z: Tensor) -> Tensor:
    finite = z != -math.inf
    values = z[finite]
    deviation = values.std() if len(values) > 1 and (values != values[0]).any() else values.new_zeros(())
    return torch.full_like(z, -math.inf).masked_scatter(finite, (values - values.mean()) / (deviation + 1e-7))


def log_softmax(z: Tensor) -> Tensor:
    """With -inf where z is -inf, and no NaN in the gradient there."""
    finite = z != -math.inf
    return torch.full_like(z, -math.inf).masked_scatter(finite, torch.log_softmax(z[finite], 0))


def kl(y: Tensor, x: Tensor) -> Tensor:
    """sum exp(y) (y - x) of log-probabilities."""
    has = y != -math.inf
    return (y[has].exp() * (y[has] - x[has])).sum()


def jsd(y: Tensor, x: Tensor, beta: float) -> Tensor:
    if beta in BOTH_ENDS:
        return kl(y, x) if beta == 0 else kl(x, y)
    has = (x != -math.inf) | (y != -math.inf)
    low = torch.full_like(x, -1e300)
    x, y = torch.where(x == -math.inf, low, x)[has], torch.where(y == -math.inf, low, y)[has]
    m = torch.logaddexp(y + math.log(beta), x + math.log1p(-beta))
    return beta * (y.exp() * (y - m)).sum() + (1 - beta) * (x.exp() * (x - m)).sum()


def decoupled(t: Tensor, s: Tensor, label: int, weights: tuple[float, float]) -> Tensor:
    others = torch.arange(len(s)) != label

    def binary(z: Tensor) -> Tensor:
        rest = z[others]
        rest = rest[rest != -math.inf]
        total = torch.logsumexp(rest, 0) if len(rest) else z.new_tensor(-math.inf)
        return log_softmax(torch.stack([z[label], total]))

    target = kl(binary(t), binary(s))
    t, s = t[others], s[others]
    if (t == -math.inf).all():
        return weights[0] * target
    return weights[0] * target + weights[1] * kl(log_softmax(t), log_softmax(s))


def divergence(
    name: str, t: Tensor, s: Tensor, beta: float, label: int, weights: tuple[float, float]
) -> Tensor:
    if name == "decoupled":
        return decoupled(t, s, label, weights)
    y, x = log_softmax(t), log_softmax(s)
    if name == "forward_kl":
        return kl(y, x)
    if name == "reverse_kl":
        return kl(x, y)
    return jsd(y, x, beta) if name == "jsd" else (y.exp() - x.exp()).abs().sum() / 2


def broken(z: Tensor) -> bool:
    return bool(z.isnan().any() or (z == math.inf).any() or (z == -math.inf).all())


def distill(
    student: Tensor,
    teacher: Tensor,
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
    num_items: float | tuple[float, float] | None = None,
    scale_by_t2: bool = True,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    weights: tuple[float, float] = (1.0, 8.0),  # of "decoupled"
    standardize: bool = False,
    softcap: float | tuple[float | None, float | None] | None = None,
) -> Result:
    """Rows with an infinite loss have gradients that are not the limit's: compare others."""
    leading, width = student.shape[:-1], student.shape[-1]
    columns = width if vocab_size is None else vocab_size
    rows = leading.numel()
    s_leaf = student.detach().double().reshape(rows, width).requires_grad_()
    t_leaf = teacher.detach().double().reshape(rows, teacher.shape[-1]).requires_grad_()
    caps = softcap if isinstance(softcap, tuple) else (softcap, softcap)
    flat_labels = None if labels is None else labels.flatten().tolist()

    def per_row(value: float | Tensor) -> list[float]:
        if isinstance(value, Tensor) and value.dim():
            return value.detach().double().flatten().tolist()
        return [float(value)] * rows

    temperatures, row_weights = per_row(temperature), per_row(1.0 if row_weight is None else row_weight)
    share = float(label_weight or 0)
    labelled = [flat_labels is not None and y != ignore_index for y in flat_labels or [0] * rows]
    distilled = labelled if labels is not None and ignored_rows == "skip" else [True] * rows
    kd_divisor = ce_divisor = 1.0
    if reduction in ("mean", "batchmean"):
        if num_items is not None:
            kd_divisor, ce_divisor = num_items if isinstance(num_items, tuple) else (num_items, num_items)
        elif reduction == "batchmean":
            kd_divisor = ce_divisor = leading[0]
        else:
            kd_divisor = sum(w for w, counts in zip(row_weights, distilled, strict=True) if counts)
            ce_divisor = sum(w for w, counts in zip(row_weights, labelled, strict=True) if counts)

    losses, stats = [], torch.zeros(rows, 5, dtype=torch.float64)
    for i in range(rows):
        loss = s_leaf.new_zeros(())
        losses.append(loss)
        if not distilled[i] or row_weights[i] == 0:
            continue
        if broken(s_leaf[i, :columns]) or broken(t_leaf[i, :columns]):
            losses[i] = (s_leaf[i].sum() + t_leaf[i].sum()) * math.nan
            stats[i] = math.nan
            continue
        s, t = capped(s_leaf[i, :columns], caps[0]), capped(t_leaf[i, :columns], caps[1])
        xs, xt = (standardized(s), standardized(t)) if standardize else (s, t)
        T = temperatures[i]
        label = flat_labels[i] if labelled[i] else 0
        d = globals()["divergence"](divergence, xt / T, xs / T, jsd_beta, label, weights)
        t2 = T * T if scale_by_t2 else 1.0
        if share != 1:
            loss = loss + (1 - share) * t2 * row_weights[i] / kd_divisor * d
        if labelled[i]:
            ce = -log_softmax(s)[label]
            log_p = log_softmax(s)
            smooth = (1 - label_smoothing) * ce
            if label_smoothing:
                smooth = smooth - label_smoothing * log_p.mean()
            if share != 0:
                loss = loss + share * row_weights[i] / ce_divisor * smooth
            stats[i, 1] = ce.detach()
        y, x = log_softmax(xt / T).detach(), log_softmax(xs / T).detach()
        stats[i, 0] = kl(y, x)
        for column, z in ((2, x), (3, y)):
            stats[i, column] = -(z.exp() * z)[z != -math.inf].sum()
        stats[i, 4] = float(s.argmax() == t.argmax())
        losses[i] = loss
    total = torch.stack(losses) if losses else s_leaf.sum(-1)
    s_grad, t_grad = torch.autograd.grad(total.sum(), (s_leaf, t_leaf), allow_unused=True)
    return Result(
        total.detach().reshape(leading) if reduction == "none" else total.detach().sum(),
        (torch.zeros_like(s_leaf) if s_grad is None else s_grad).reshape(student.shape),
        (torch.zeros_like(t_leaf) if t_grad is None else t_grad).reshape(teacher.shape),
        stats,
    )
