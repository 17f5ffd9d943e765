"""What the results must be: float64, from the formulas, and how far from them a result may lie.

Nothing of the package is used here. Everything is a loop over rows: slow and plain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    relative: float  # of an accumulated result against float64, norm-wise
    roundoff: float  # half a unit in the last place: what one rounding to this dtype adds


# Losses are float32 (float64 for float64), so `roundoff` matters for gradients and weights of 16 bits only: there it
# is one rounding of a value that is within `relative`.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 2.0**-53),
    torch.float32: Tolerance(2e-6, 2.0**-24),
    torch.bfloat16: Tolerance(2e-6, 2.0**-8),
    torch.float16: Tolerance(2e-6, 2.0**-11),
}
DTYPES = tuple(TOLERANCES)


def norm_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖; 0 where both are 0, inf where a NaN or an infinity differs."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, f"shape {list(actual.shape)}, expected {list(exact.shape)}"
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, actual - exact)
    if not difference.isfinite().all():
        return math.inf
    size = torch.where(exact.isfinite(), exact, 0.0).norm().item()
    error = difference.norm().item()
    return 0.0 if error == 0 else error / size if size else math.inf


def assert_norm_close(actual: Tensor, exact: Tensor, dtype: torch.dtype | None = None) -> None:
    """`actual` is `exact` to the tolerance of `dtype` (default: its own), norm-wise; NaN and inf where that is."""
    dtype = actual.dtype if dtype is None else dtype
    tolerance = TOLERANCES[dtype].relative
    if actual.dtype in (torch.bfloat16, torch.float16):
        exact = exact.detach().double()
        finite = torch.where(exact.isfinite(), exact, 0.0)
        rounding = (finite.to(actual.dtype).double() - finite).norm() / finite.norm().clamp_min(1e-300)
        # The rounding of a value that differs by `tolerance` is another one, of the same size.
        tolerance += 1.05 * rounding.item()
    error = norm_error(actual, exact)
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.2e}"


def assert_one_rounding(actual: Tensor, exact: Tensor, slack: Tensor | float) -> None:
    """Every element of `actual` is the rounding to its dtype of some value within `slack` of `exact`."""
    exact = exact.detach().double()
    low, high = (exact - slack).to(actual.dtype), (exact + slack).to(actual.dtype)
    wrong = ~((low <= actual) & (actual <= high))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements; first: {actual[wrong][0].item()!r} "
        f"for exactly {exact[wrong][0].item()!r}"
    )


# ---------------------------------------------------------------------------------------------------------- kd


def softmax(z: Tensor) -> Tensor:
    """Of one float64 row. NaN throughout where softmax is not defined: NaN, +inf, or -inf throughout."""
    if z.isnan().any() or (z == math.inf).any() or (z == -math.inf).all():
        return torch.full_like(z, math.nan)
    e = torch.exp(z - z.max())
    return e / e.sum()


def log_sum_exp(z: Tensor) -> Tensor:
    return z.max() + torch.log(torch.exp(z - z.max()).sum())


def kl_row(s: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(softmax(t/T) || softmax(s/T)) of one float64 row and its gradient for s."""
    s, t = s / temperature, t / temperature
    p, q = softmax(s), softmax(t)
    if p.isnan().any() or q.isnan().any():
        nan = torch.full_like(s, math.nan)
        return nan[0], nan
    # log q - log p as a difference of logits, which does not cancel where they agree. 0 * (-inf) = 0.
    top_s, top_t = s.max(), t.max()
    log_ratio = ((t - top_t) - (s - top_s)) + (log_sum_exp(s - top_s) - log_sum_exp(t - top_t))
    return torch.where(q == 0, 0.0, q * log_ratio).sum(), (p - q) / temperature


def ce_row(s: Tensor, label: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of one float64 row at temperature 1 and its gradient, smoothed as F.cross_entropy does."""
    p = softmax(s)
    target = torch.full_like(s, smoothing / len(s))
    target[label] += 1 - smoothing
    if p.isnan().any():
        return p[0], p
    return torch.where(target == 0, 0.0, target * (log_sum_exp(s) - s)).sum(), p - target


def kd(
    student: Tensor,  # [..., V]
    teacher: Tensor,  # [..., V]
    labels: Tensor | None = None,  # [...]
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
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum for the student's logits, both float64."""
    leading, width = student.shape[:-1], student.shape[-1]
    columns = width if vocab_size is None else vocab_size
    s_rows = student.detach().double().reshape(leading.numel(), width)
    t_rows = teacher.detach().double().reshape(leading.numel(), teacher.shape[-1])
    rows = len(s_rows)

    def per_row(value: float | Tensor) -> list[float]:
        if isinstance(value, Tensor) and value.dim():
            return value.detach().double().flatten().tolist()
        return [float(value)] * rows

    temperatures, weights = per_row(temperature), per_row(1.0 if row_weight is None else row_weight)
    # What a row of this loss is made of: a distillation part, a label part, both, or nothing.
    distilled, labelled = [True] * rows, [False] * rows
    share = 0.0
    if labels is not None:
        share = float(label_weight)
        labelled = [y != ignore_index for y in labels.flatten().tolist()]
        if ignored_rows == "skip":
            distilled = labelled

    kd_divisor = ce_divisor = 1.0
    if reduction in ("mean", "batchmean"):
        if num_items is not None:
            kd_divisor, ce_divisor = num_items if isinstance(num_items, tuple) else (num_items, num_items)
        elif reduction == "batchmean":
            kd_divisor = ce_divisor = leading[0]
        else:
            kd_divisor = sum(w for w, counts in zip(weights, distilled, strict=True) if counts)
            ce_divisor = kd_divisor
            if labels is not None:
                ce_divisor = sum(w for w, counts in zip(weights, labelled, strict=True) if counts)

    losses, grad = s_rows.new_zeros(rows), torch.zeros_like(s_rows)
    for i in range(rows):
        s, t = s_rows[i, :columns], t_rows[i, :columns]
        if distilled[i] and weights[i] != 0 and share != 1:
            t2 = temperatures[i] ** 2 if scale_by_t2 else 1.0
            value, g = kl_row(s, t, temperatures[i])
            losses[i] += (1 - share) * t2 * weights[i] / kd_divisor * value
            grad[i, :columns] += (1 - share) * t2 * weights[i] / kd_divisor * g
        if labelled[i] and weights[i] != 0 and share != 0:
            value, g = ce_row(s, int(labels.flatten()[i]), label_smoothing)
            losses[i] += share * weights[i] / ce_divisor * value
            grad[i, :columns] += share * weights[i] / ce_divisor * g
    loss = losses.reshape(leading) if reduction == "none" else losses.sum()
    return loss, grad.reshape(student.shape)


# ------------------------------------------------------------------------------------------------ l2sp and blend


def roundoff(result: Tensor) -> float:
    """Of the arithmetic behind a result: that of fp32, or of fp64 for an fp64 result."""
    return TOLERANCES[torch.float64 if result.dtype == torch.float64 else torch.float32].roundoff


def l2sp(params: Sequence[Tensor], start: Sequence[Tensor | None], strength: float) -> Tensor:
    """The penalty, float64. None as a start point is 0."""
    value = torch.zeros((), dtype=torch.float64)
    for p, p0 in zip(params, start, strict=True):
        value += strength * (p.detach().double() - (0 if p0 is None else p0.detach().double())).square().sum()
    return value


def l2sp_grad(p: Tensor, p0: Tensor | None, factor: float, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """``before + factor (p - p0)`` in float64, and how far a result may lie from it before it is rounded."""
    added = factor * (p.detach().double() - (0 if p0 is None else p0.detach().double()))
    before = torch.zeros_like(added) if before is None else before.double()
    # Roundings: the difference, the factor, the product, the sum.
    return before + added, 4 * roundoff(p) * (added.abs() + before.abs())


def blend(
    target: Tensor, sources: Sequence[Tensor], alpha: float, scale: float | None, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``alpha target + scale sum_i w_i source_i`` in float64 (scale None: 1 - alpha), and how far a result may lie
    from it before it is rounded."""
    scale = 1 - alpha if scale is None else scale
    terms = [target.detach().double(), *(s.detach().double() for s in sources)]
    coefs = [alpha, *(scale * w for w in weights)]
    exact = sum(coef * x for coef, x in zip(coefs, terms, strict=True))
    # Roundings: a difference, a coefficient, a product per term, and the sums.
    size = sum(max(1, abs(coef)) * x.abs() for coef, x in zip(coefs, terms, strict=True))
    return exact, (3 + len(terms)) * roundoff(target) * size
