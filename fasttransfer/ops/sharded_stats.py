"""What a sweep over some columns of rows leaves, and how everybody's combine to that of whole rows.

Sums of exponentials combine as in ``csrc/core/row_stat.h``: each is rescaled by ``exp((own maximum - maximum)/T)``. A
shard of -inf has no mass; a rank without columns takes part with one logit of -inf. Who calls this: ``sharded.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttransfer.ops import divergences
from fasttransfer.ops.distill import Moments, weighted
from fasttransfer.ops.divergences import Pair, Peak, kl_from, pair_about, reference, swapped

Columns = dict[str, Tensor]  # of each row of a chunk, or of all; [rows], or [ranks, rows] once gathered


def pair_statistics(s: Tensor, t: Tensor, temperature: Tensor, want: frozenset[str]) -> Columns:
    """Of two sides' columns: maxima, sums, and of ``want`` what is in it.

    ``cross_t``, ``cross_s``: see cross_of, weighted by that side's mass. ``entropy``: sums of both. ``peak_t``,
    ``peak_s``: for the gradient of that side where its mass weights the differences.
    """
    acc = temperature.dtype
    tops = {"s": s.amax(-1, keepdim=True), "t": t.amax(-1, keepdim=True)}
    pair = pair_about(s - reference(tops["s"]), t - reference(tops["t"]), temperature)
    done = {"sum_s": pair.sum_s, "sum_t": pair.sum_t}
    if "entropy" in want:
        done["entropy_s"], done["entropy_t"] = (
            weighted(pair.es, pair.ds, acc),
            weighted(pair.et, pair.dt, acc),
        )
    for side, one, own, other in (("t", pair, t, s), ("s", swapped(pair), s, t)):
        done["top_" + side] = tops[side][:, 0].to(acc)
        if "cross_" + side in want:
            done["cross_" + side] = divergences.cross_of(one)
        if "peak_" + side in want:
            # Of Pair's two sides t is the one that weights.
            place = own.argmax(-1, keepdim=True)
            difference = one.dt - one.ds
            moved = divergences.above_peak(one.et, difference, difference.gather(-1, place))
            done["peak_" + side] = (one.et * moved).sum(-1, dtype=acc)
            done["other_" + side] = other.gather(-1, place)[:, 0].to(acc)
    return done


class Whole(NamedTuple):
    """Of two sides' whole rows: what pair_statistics of all ranks make together."""

    # [rows] acc. Of each side: top, ref (reference of that), sum; where wanted cross, entropy; and of a peak other (the
    # other side's logit where this side has its maximum) and peak (sum of mass times what is above that place).
    of: Columns

    def part(self, flat: slice) -> Whole:
        """Of some of the rows."""
        return Whole({name: x[flat] for name, x in self.of.items()})

    def kl(self, temperature: Tensor, side: str = "t") -> Tensor:
        """KL(q || p), or with ``side="s"`` KL(p || q)."""
        other = "s" if side == "t" else "t"
        return kl_from(self.of["cross_" + side], self.of["sum_" + other], self.of["sum_" + side], temperature)

    def pair(self, s: Tensor, t: Tensor, temperature: Tensor) -> Pair:
        """Of columns of these rows, with the probabilities that they have in the whole rows."""
        ds, dt = (x - self.of[ref].to(x.dtype)[:, None] for x, ref in ((s, "ref_s"), (t, "ref_t")))
        return pair_about(ds, dt, temperature)._replace(sum_s=self.of["sum_s"], sum_t=self.of["sum_t"])

    def peak(self, side: str, temperature: Tensor, dtype: torch.dtype) -> Peak | None:
        """Where that side has most of its mass, of the difference of the logits over T."""
        if "peak_" + side not in self.of:
            return None
        other_ref = self.of["ref_t" if side == "s" else "ref_s"]
        # By the operations of the differences that it is taken from: at the peak itself nothing must be left.
        at = -(self.of["other_" + side].to(dtype) - other_ref.to(dtype)) * (1 / temperature).to(dtype)
        mean = self.of["peak_" + side] / (self.of["sum_" + side] * temperature)
        return Peak(at[:, None], mean.to(dtype)[:, None])


def rescaling(own: Tensor, whole: Tensor, inv_t: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp((own - whole)/T)``, of references. What underflows in the dtype of the probabilities has no mass there."""
    x = (own - whole) * inv_t
    return torch.where(x.to(dtype).exp() == 0, 0.0, x.exp())


def scaled(mass: Tensor, factor: Tensor) -> Tensor:
    """A sum of exponentials, rescaled. No mass stays no mass, also where the factor is infinite."""
    return torch.where(mass == 0, 0.0, mass * factor)


def moved(total: Tensor, mass: Tensor, by: Tensor, factor: Tensor) -> Tensor:
    """A sum weighted by ``mass`` whose terms move ``by`` as much, rescaled. What underflows was nothing."""
    return torch.where((mass == 0) | (factor == 0), 0.0, factor * (total + mass * by))


def combined(local: Columns, temperature: Tensor, dtype: torch.dtype) -> Whole:
    """The statistics of whole rows from everybody's, ``[ranks, rows]``."""
    inv_t = (1 / temperature).to(dtype).to(temperature.dtype)  # as the exponentials have it
    own, move, factor = {}, {}, {}
    whole: Columns = {}
    for side in "st":
        own[side] = reference(local["top_" + side])
        whole["top_" + side] = local["top_" + side].amax(0)
        whole["ref_" + side] = reference(whole["top_" + side])
        move[side] = own[side] - whole["ref_" + side]
        factor[side] = rescaling(own[side], whole["ref_" + side], inv_t, dtype)
        whole["sum_" + side] = scaled(local["sum_" + side], factor[side]).sum(0)
    for side, other in (("s", "t"), ("t", "s")):

        def together(name: str, by: Tensor, side: str = side) -> None:
            if name + side in local:
                terms = moved(local[name + side], local["sum_" + side], by, factor[side])
                whole[name + side] = terms.sum(0)

        together("cross_", move[side] - move[other])
        together("entropy_", move[side])
        if "peak_" + side in local:
            owner = local["top_" + side].argmax(0, keepdim=True)
            at = whole["other_" + side] = local["other_" + side].gather(0, owner)[0]
            together("peak_", (own[side] - local["other_" + side]) - (whole["ref_" + side] - at))
    return Whole(whole)


def peak_statistics(mass: Tensor, f: Tensor, acc: torch.dtype, side: str) -> Columns:
    """Of columns of a softmax: its largest, f there, the sum of what is above that, the mass."""
    at, above = divergences.peak_of(mass, f, acc)
    return {
        "largest_" + side: mass.amax(-1).to(acc),
        "at_" + side: at[:, 0].to(acc),
        "above_" + side: above,
        "mass_" + side: mass.sum(-1, dtype=acc),
    }


def combined_peak(local: Columns, side: str, dtype: torch.dtype) -> Peak:
    """The peak of whole rows from everybody's peak_statistics, ``[ranks, rows]``."""
    owner = local["largest_" + side].argmax(0, keepdim=True)
    at = local["at_" + side].gather(0, owner)
    mass = local["mass_" + side]
    mean = torch.where(mass == 0, 0.0, local["above_" + side] + mass * (local["at_" + side] - at)).sum(0)
    return Peak(at[0].to(dtype)[:, None], mean.to(dtype)[:, None])


def combined_moments(local: Columns, side: str) -> Moments:
    """The moments of whole rows from everybody's, ``[ranks, rows]`` (Chan, Golub and LeVeque 1979)."""
    count, square = local["count_" + side], local["square_" + side]
    mean = torch.where(count == 0, 0.0, local["mean_" + side])
    n = count.sum(0)
    center = (count * mean).sum(0) / n
    square = (square + count * (mean - center).square()).sum(0)
    return Moments(n.long()[:, None], center[:, None], square[:, None])
