"""The divergences between a student's and a teacher's softmax, row by row, in plain torch.

With ``x = log p`` (student) and ``y = log q`` (teacher), both at temperature T::

    forward_kl   sum q (y - x)
    reverse_kl   sum p (x - y)
    jsd          sum beta q (y - m) + (1 - beta) p (x - m),   m = log(beta q + (1 - beta) p)
    tvd          sum |p - q| / 2
    decoupled    target_weight KL(b_t || b_s) + nontarget_weight KL(q' || p'):  b = (mass of the label, the rest),
                 p', q' the softmaxes without the label (Zhao et al. 2022, "Decoupled Knowledge Distillation", eq. 7)

The gradient for the student's logit v is ``p_v (f_v - sum_u p_u f_u)/T`` with f = x - y for reverse KL, ``(1-beta)
(x - m)`` for jsd, ``sign(p - q)/2`` for tvd; for the teacher's ``q_v (h_v - sum_u q_u h_u)/T`` with h = y - x for
forward KL, ``beta (y - m)`` for jsd, ``sign(q - p)/2`` for tvd. Of either KL the side behind the bars has (p - q)/T.

What is done to an element is apart from what is summed over a row: ``ops/sharded.py`` does the first with a part of the
columns, where the sums are of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Value(NamedTuple):
    """A divergence per row, and its gradients (None where not wanted)."""

    value: Tensor  # [rows] acc
    student: Tensor | None  # [rows, V] compute dtype
    teacher: Tensor | None


class Pair(NamedTuple):
    """Two rows of logits as softmaxes. Differences come from logits: where both agree they do not cancel."""

    ds: Tensor  # [rows, V] logits minus their maximum
    dt: Tensor
    es: Tensor  # exp(ds/T)
    et: Tensor
    sum_s: Tensor  # [rows] acc
    sum_t: Tensor
    temperature: Tensor  # [rows] acc

    @property
    def p(self) -> Tensor:
        """The student's probabilities."""
        return self.es / self.sum_s.to(self.es.dtype)[:, None]

    @property
    def q(self) -> Tensor:
        """The teacher's probabilities."""
        return self.et / self.sum_t.to(self.et.dtype)[:, None]

    def difference(self) -> Tensor:
        """x - y, 0 where both are -inf."""
        inv_t = (1 / self.temperature).to(self.ds.dtype)[:, None]
        log_ratio = torch.log(self.sum_s / self.sum_t).to(self.ds.dtype)[:, None]
        both = (self.ds == -torch.inf) & (self.dt == -torch.inf)
        return torch.where(both, 0.0, (self.ds - self.dt) * inv_t - log_ratio)


def reference(top: Tensor) -> Tensor:
    """What differences of a row are taken from: its maximum, or 0 where that is -inf (so that exp gives 0)."""
    return top.masked_fill(top == -torch.inf, 0.0)


def centred(x: Tensor) -> Tensor:
    """``x - max x`` per row, with 0 as the reference of a row that is -inf throughout."""
    return x - reference(x.amax(-1, keepdim=True))


def exp_sum(x: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(x) and its sum per row."""
    e = x.exp()
    return e, e.sum(-1, dtype=acc)


def pair_of(s: Tensor, t: Tensor, temperature: Tensor) -> Pair:
    """The softmaxes of two ``[rows, V]`` at one temperature per row."""
    return pair_about(centred(s), centred(t), temperature)


def pair_about(ds: Tensor, dt: Tensor, temperature: Tensor) -> Pair:
    """As pair_of, of logits minus what is the reference of their row."""
    inv_t = (1 / temperature).to(ds.dtype)[:, None]
    es, sum_s = exp_sum(ds * inv_t, temperature.dtype)
    et, sum_t = exp_sum(dt * inv_t, temperature.dtype)
    return Pair(ds, dt, es, et, sum_s, sum_t, temperature)


def cross_of(pair: Pair) -> Tensor:
    """sum exp(dt/T) (dt - ds)"""
    return torch.where(pair.et == 0, 0.0, pair.et * (pair.dt - pair.ds)).sum(-1, dtype=pair.sum_t.dtype)


def kl_from(cross: Tensor, sum_s: Tensor, sum_t: Tensor, temperature: Tensor) -> Tensor:
    """KL(q || p) from the sums of a row."""
    return cross / (sum_t * temperature) + torch.log(sum_s / sum_t)


def kl_of(pair: Pair) -> Tensor:
    """KL(q || p) per row, exactly 0 where the rows are the same."""
    return kl_from(cross_of(pair), pair.sum_s, pair.sum_t, pair.temperature)


def swapped(pair: Pair) -> Pair:
    """Teacher and student exchanged."""
    return Pair(pair.dt, pair.ds, pair.et, pair.es, pair.sum_t, pair.sum_s, pair.temperature)


class Peak(NamedTuple):
    """Where a softmax has most of its mass: f there, and the mean of f minus that. ``[rows, 1]``, f's dtype."""

    at: Tensor
    mean: Tensor


def above_peak(mass: Tensor, f: Tensor, at: Tensor) -> Tensor:
    """f - at, 0 where there is no mass."""
    return torch.where(mass != 0, f - at, 0.0)


def peak_of(mass: Tensor, f: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """f where the mass of a row is largest, ``[rows, 1]``, and ``sum mass (f - that)``, ``[rows]`` acc."""
    at = f.gather(-1, mass.argmax(-1, keepdim=True))
    return at, (mass * above_peak(mass, f, at)).sum(-1, dtype=acc)


def spread(mass: Tensor, f: Tensor, temperature: Tensor, peak: Peak | None = None) -> Tensor:
    """``mass_v (f_v - sum_u mass_u f_u) / T``, mass being a softmax; ``peak`` where this is a part of its columns.

    f is taken from its value where the mass is largest. Where nearly all of it is in one place the difference is small
    beside f, and rounding f would be all that is left of it.
    """
    if peak is None:
        at, mean = peak_of(mass, f, temperature.dtype)
        peak = Peak(at, mean.to(f.dtype)[:, None])
    moved = above_peak(mass, f, peak.at)
    return mass * (moved - peak.mean) * (1 / temperature).to(f.dtype)[:, None]


def kl_gradients(
    pair: Pair, value: Tensor, want_p: bool, want_q: bool, peak: Peak | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Of KL(q || p) for the logits of p, and for those of q (0 in a row whose value is infinite)."""
    of_p = (pair.p - pair.q) * (1 / pair.temperature).to(pair.es.dtype)[:, None] if want_p else None
    of_q = None
    if want_q:
        infinite = torch.isposinf(value)[:, None]
        difference = torch.where((pair.et == 0) | infinite, 0.0, pair.dt - pair.ds)
        inv_t = (1 / pair.temperature).to(pair.es.dtype)[:, None]
        of_q = torch.where(infinite, 0.0, spread(pair.q, difference * inv_t, pair.temperature, peak))
    return of_p, of_q


def forward_kl(pair: Pair, want_s: bool, want_t: bool) -> Value:
    """KL(q || p)."""
    value = kl_of(pair)
    return Value(value, *kl_gradients(pair, value, want_s, want_t))


def reverse_kl(pair: Pair, want_s: bool, want_t: bool) -> Value:
    """KL(p || q)."""
    other_way = swapped(pair)
    value = kl_of(other_way)
    of_t, of_s = kl_gradients(other_way, value, want_t, want_s)
    return Value(value, of_s, of_t)


class Terms(NamedTuple):
    """Of a divergence whose value is a sum over columns: what is summed, and the f of its gradients."""

    value: Tensor  # [rows, V]
    f_s: Tensor
    f_t: Tensor


def jsd(pair: Pair, beta: float) -> Terms:
    """The generalized Jensen-Shannon divergence, beta in (0, 1)."""
    d = pair.difference()
    # m relative to the larger of x and y: exp of what is at most 0, so nothing overflows, and p = 0 costs nothing.
    e = torch.expm1(-d.abs())
    above = d >= 0  # p >= q
    from_larger = -torch.log1p(torch.where(above, beta * e, (1 - beta) * e))  # x - m or y - m
    x_m = (1 - beta) * torch.where(above, from_larger, from_larger + d)
    y_m = beta * torch.where(above, from_larger - d, from_larger)
    terms = torch.where(pair.es == 0, 0.0, pair.p * x_m) + torch.where(pair.et == 0, 0.0, pair.q * y_m)
    return Terms(terms, x_m, y_m)


def tvd(pair: Pair) -> Terms:
    """The total variation distance, with 0 as its derivative where p = q."""
    difference = pair.p - pair.q
    half = torch.sign(difference) / 2
    return Terms(difference.abs() / 2, half, -half)


def value_of(terms: Terms, pair: Pair, want_s: bool, want_t: bool) -> Value:
    """The divergence that these are the terms of."""
    return Value(
        terms.value.sum(-1, dtype=pair.sum_s.dtype),
        spread(pair.p, terms.f_s, pair.temperature) if want_s else None,
        spread(pair.q, terms.f_t, pair.temperature) if want_t else None,
    )


def _binary_kl(a_t: Tensor, a_s: Tensor) -> Tensor:
    """KL of (sigmoid(a_t), sigmoid(-a_t)) from that of a_s; 0 * inf = 0."""
    value = torch.zeros_like(a_t)
    for sign in (1, -1):
        mass = torch.sigmoid(sign * a_t)
        value = value + torch.where(
            mass == 0, 0.0, mass * (F.logsigmoid(sign * a_t) - F.logsigmoid(sign * a_s))
        )
    return torch.where(a_t == a_s, 0.0, value)


def replaced(x: Tensor, index: Tensor, value: Tensor | float, here: Tensor | None = None) -> Tensor:
    """x with ``value``, a number or ``[rows, 1]``, in column ``index`` of each row, or of those that are ``here``."""
    if isinstance(value, float):
        value = x.new_full(index.shape, value)
    return x.scatter(-1, index, value if here is None else torch.where(here, value, x.gather(-1, index)))


def label_odds(of_label: Tensor, top: Tensor, total: Tensor, temperature: Tensor) -> Tensor:
    """Of the label's class: log p - log(1 - p), from its logit and from the maximum and the sum of the others."""
    return (of_label - reference(top)) / temperature - torch.log(total)


def decoupled(
    s: Tensor,
    t: Tensor,
    index: Tensor,
    temperature: Tensor,
    weights: tuple[float, float],
    want_s: bool,
    want_t: bool,
) -> Value:
    """Target and non-target parts; ``index [rows, 1]``: the label's column.

    The mass beside the label is a softmax of its own, so that nothing is subtracted from 1: with a_s = x_label - log
    sum exp of the others, the label's probability is sigmoid(a_s).
    """
    acc = temperature.dtype
    others_s, others_t = replaced(s, index, -torch.inf), replaced(t, index, -torch.inf)
    rest = pair_of(others_s, others_t, temperature)
    a_s, a_t = (
        label_odds(z.gather(-1, index)[:, 0].to(acc), others.amax(-1).to(acc), total, temperature)
        for z, others, total in ((s, others_s, rest.sum_s), (t, others_t, rest.sum_t))
    )
    of_rest = kl_of_rest(kl_of(rest), rest.sum_s, rest.sum_t)
    return Value(
        decoupled_value(of_rest, a_s, a_t, weights),
        *decoupled_gradients(rest, of_rest, a_s, a_t, index, weights, want_s, want_t),
    )


def kl_of_rest(kl: Tensor, sum_s: Tensor, sum_t: Tensor) -> Tensor:
    """KL(q' || p'), also where one of them has no mass."""
    return torch.where(sum_t > 0, torch.where(sum_s > 0, kl, torch.inf), 0.0)


def decoupled_value(rest_value: Tensor, a_s: Tensor, a_t: Tensor, weights: tuple[float, float]) -> Tensor:
    """The divergence from KL(q' || p') and the label's odds."""
    return weights[0] * _binary_kl(a_t, a_s) + weights[1] * rest_value


def decoupled_gradients(
    rest: Pair,
    rest_value: Tensor,  # [rows], kl_of_rest
    a_s: Tensor,  # [rows], odds of the label
    a_t: Tensor,
    index: Tensor,
    weights: tuple[float, float],
    want_s: bool,
    want_t: bool,
    here: Tensor | None = None,  # [rows, 1]: whether the label's column is among these
    peak: Peak | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """For the student's logits and for the teacher's, of columns of the row."""
    temperature, dtype = rest.temperature, rest.es.dtype
    on_target, on_rest = weights
    both = (rest.sum_t > 0) & (rest.sum_s > 0)
    of_rest = kl_gradients(rest, rest_value, want_s, want_t, peak)
    p_y, q_y = torch.sigmoid(a_s), torch.sigmoid(a_t)
    # d KL(b_t || b_s) / d a_s, / d a_t
    moves = (p_y - q_y, torch.nan_to_num(q_y * torch.sigmoid(-a_t) * (a_t - a_s), 0.0, 0.0, 0.0))
    gradients: list[Tensor | None] = []
    for part, move, e, total in zip(
        of_rest, moves, (rest.es, rest.et), (rest.sum_s, rest.sum_t), strict=True
    ):
        if part is None:
            gradients.append(None)
            continue
        move = on_target * move / temperature
        of_mass = torch.where(total > 0, move / total, 0.0).to(dtype)[:, None]
        grad = torch.where(both[:, None], on_rest * part, 0.0) - e * of_mass
        gradients.append(replaced(grad, index, move.to(dtype)[:, None], here))
    return gradients[0], gradients[1]
