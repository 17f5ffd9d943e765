"""The distillation losses of rows whose columns are split over the ranks of a process group, in plain torch.

What ``ops/distill.py`` computes, in sweeps over the rank's own columns. A sweep leaves a few numbers per row, a row of
statistics; all ranks get everybody's in one all-gather and combine them alike, so that the loss has the same bits
everywhere. Between all-gathers nothing of the size of the logits is kept: each sweep reads them again. The gradient of
the local columns is computed in the forward pass, so backward communicates nothing.

============  ==================================================================  ============================
all-gather    of each rank's                                                      where
============  ==================================================================  ============================
shards        number of columns                                                   labels or vocab_size
moments       count, mean and squared deviation of each side                      standardize
sweep         maxima and sums of exponentials of each side, and what the loss      always
              weights by them
terms         sums of the divergence's terms, once the probabilities are known    jsd, tvd
along         sum of gradient times logit of each side                            standardize, with a gradient
============  ==================================================================  ============================

What a sweep leaves and how it combines is in ``sharded_stats.py``; here is in which order, and with whom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer.ops import divergences
from fasttransfer.ops.distill import (
    STATS,
    DistillFunction,
    Gradient,
    Moments,
    Side,
    along,
    capped,
    entropy_from,
    label_gradient,
    label_loss,
    moments_of,
    side_of,
    terms_of,
    through_softcap,
    through_standardize,
)
from fasttransfer.ops.divergences import Pair, Peak, reference, swapped
from fasttransfer.ops.kd import chunks, row_weights
from fasttransfer.ops.library import compute_dtype
from fasttransfer.ops.sharded_stats import (
    Columns,
    combined,
    combined_moments,
    combined_peak,
    pair_statistics,
    peak_statistics,
    rescaling,
    scaled,
)


class Shards(NamedTuple):
    """Who holds what: the group, the first column that is here, and how many there are on all ranks.

    Numbers, or tensors of one on the logits' device (which then need not be waited for); None where nobody asks.
    """

    group: Any
    offset: int | Tensor | None
    total: int | Tensor | None


def all_gather(packed: Tensor, group: Any) -> Tensor:
    """``[ranks, *packed.shape]`` of a contiguous tensor that has the same shape on all ranks."""
    import torch.distributed as dist

    everybody = packed.new_empty(dist.get_world_size(group), *packed.shape)
    if packed.numel():
        # all_gather_into_tensor by another name; that of torch 2.13 and later.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(everybody.view(-1), packed.view(-1), group=group)
    return everybody


class _Chunk(NamedTuple):
    """Some rows, of the columns that are here and count."""

    index: Any  # into the leading dimensions
    flat: slice  # of the flattened rows
    s: Tensor  # [rows, columns] compute dtype
    t: Tensor | None
    counted: Tensor  # [rows] bool


class _Run:
    """One call."""

    def __init__(
        self, student: Tensor, teacher: Tensor, shards: Shards, args: tuple[Any, ...], want: tuple[bool, bool]
    ) -> None:
        (
            labels, row_weight, row_temperature, num_items, num_items_constant, temperature, self.label_weight,
            self.smoothing, ignore_index, distill_ignored, vocab_size, self.reduction, scale_by_t2,
            self.divergence, self.args, self.standardize, self.caps, self.want_stats,
        ) = args  # fmt: skip
        self.student, self.teacher, self.shards = student, teacher, shards
        self.want_s, self.want_t = want
        self.leading, self.width = student.shape[:-1], student.shape[-1]
        self.rows = self.leading.numel()
        self.dtype = compute_dtype(student, teacher)
        self.temperature, self.kd_weight, self.ce_weight = row_weights(
            self.rows, self.leading[0] if self.leading else 1, student, labels, row_weight, row_temperature, num_items,
            num_items_constant, temperature, self.label_weight, ignore_index, distill_ignored, self.reduction,
            scale_by_t2,
        )  # fmt: skip
        self.distills = labels is None or self.label_weight != 1 or self.want_stats
        self.has_label_term = labels is not None and (self.label_weight != 0 or self.want_stats)
        # Columns that are here and count; those of all ranks.
        self.real = torch.ones(max(self.width, 1), dtype=torch.bool, device=student.device)
        self.columns: int | Tensor | None = shards.total
        if self.width == 0:
            self.real[:] = False
        self.broken = torch.zeros(self.rows, dtype=torch.bool, device=student.device)
        if vocab_size is not None:
            assert shards.offset is not None
            assert shards.total is not None
            self.real &= torch.arange(len(self.real), device=student.device) + shards.offset < vocab_size
            self.broken |= torch.as_tensor(shards.total, device=student.device) < vocab_size
            self.columns = vocab_size
        self.all_real = vocab_size is None and self.width > 0

        self.x_is_raw = not (self.standardize or any(self.caps) or self.divergence == "decoupled")
        self.labelled = self.label_index = self.label_here = None
        if labels is not None:
            assert shards.offset is not None
            assert self.columns is not None
            flat = labels.reshape(-1)
            self.labelled = flat != ignore_index
            out_of_range = self.labelled & ((flat < 0) | (flat >= self.columns))
            self.broken |= out_of_range
            here = flat - shards.offset
            self.label_here = self.labelled & ~out_of_range & (here >= 0) & (here < self.width)
            self.label_index = torch.where(self.label_here, here, 0)
        self.moments: dict[str, Moments] = {}
        self.label_of: dict[str, Tensor] = {}
        self.peaks: dict[str, Peak] = {}
        self.alongs: Columns = {}
        self.value = torch.zeros_like(self.temperature)

    # ------------------------------------------------------------------------------------------ rows and sweeps
    def chunks(self) -> Iterator[_Chunk]:
        """The rows, some at a time."""
        for index, flat in chunks(self.leading, len(self.real)):
            kd_w = self.kd_weight[flat]
            counted = kd_w != 0 if self.ce_weight is None else (kd_w != 0) | (self.ce_weight[flat] != 0)
            s = self._read(self.student, index, counted)
            reads_teacher = counted if self.want_stats else kd_w != 0
            t = self._read(self.teacher, index, reads_teacher) if self.distills else None
            yield _Chunk(index, flat, s, t, counted)

    def _read(self, logits: Tensor, index: Any, counted: Tensor) -> Tensor:
        if self.width:
            x = logits[index].reshape(-1, self.width).to(self.dtype)
        else:
            x = torch.zeros(len(counted), 1, dtype=self.dtype, device=logits.device)
        # Rows that are not counted must not spread their NaN: they are computed on zeros, with weight 0.
        x = torch.where(counted[:, None], x, 0.0)
        return x if self.all_real else torch.where(self.real, x, -torch.inf)

    def sweep(self, statistics: Callable[[_Chunk], Columns]) -> Columns:
        """One sweep and one all-gather: everybody's statistics of all rows, ``[ranks, rows]`` each."""
        parts = [statistics(chunk) for chunk in self.chunks()]
        if not parts:
            return {}
        packed = torch.cat([torch.stack(list(part.values())) for part in parts], -1)
        return dict(zip(parts[0], all_gather(packed, self.shards.group).unbind(1), strict=True))

    def sides(self, chunk: _Chunk) -> tuple[Side, Side | None]:
        """Both sides as they enter the loss."""
        done = []
        for name, raw, cap in (("s", chunk.s, self.caps[0]), ("t", chunk.t, self.caps[1])):
            if raw is None:
                continue
            moments = self.moments.get(name)
            if moments is not None:
                moments = Moments(*(m[chunk.flat] for m in moments))
            done.append(side_of(capped(raw, cap), cap, moments))
        return done[0], done[1] if len(done) > 1 else None

    def label(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """The label's column here, ``[rows, 1]``, and whether it is here."""
        assert self.label_index is not None
        assert self.label_here is not None
        return self.label_index[chunk.flat][:, None], self.label_here[chunk.flat][:, None]

    def _label_logit(self, x: Tensor, chunk: _Chunk) -> Tensor:
        index, here = self.label(chunk)
        return torch.where(here, x.gather(-1, index), 0.0)[:, 0].to(self.value.dtype)

    # ---------------------------------------------------------------------------------------- statistics of a chunk
    def moment_statistics(self, chunk: _Chunk) -> Columns:
        done: Columns = {}
        for name, raw, cap in (("s", chunk.s, self.caps[0]), ("t", chunk.t, self.caps[1])):
            if raw is not None:
                m = moments_of(capped(raw, cap))
                for key, x in (("count_", m.number), ("mean_", m.mean), ("square_", m.square)):
                    done[key + name] = x[:, 0].to(self.value.dtype)
        return done

    def pair_wants(self) -> frozenset[str]:
        """What the divergence needs of the sweep beside maxima and sums."""
        if self.divergence in ("forward_kl", "decoupled"):
            return frozenset({"cross_t"} | ({"peak_t"} if self.want_t else set()))
        if self.divergence == "reverse_kl":
            return frozenset({"cross_s"} | ({"peak_s"} if self.want_s else set()))
        return frozenset()

    def sweep_statistics(self, chunk: _Chunk) -> Columns:
        student, teacher = self.sides(chunk)
        temperature = self.temperature[chunk.flat]
        acc = temperature.dtype
        done: Columns = {}
        if teacher is not None:
            wants = self.pair_wants()
            s, t = student.x, teacher.x
            if self.divergence == "decoupled":
                if self.want_stats:
                    whole = pair_statistics(s, t, temperature, frozenset({"cross_t", "entropy"}))
                    done.update({"whole_" + name: x for name, x in whole.items()})
                done["label_s"], done["label_t"] = self._label_logit(s, chunk), self._label_logit(t, chunk)
                index, here = self.label(chunk)
                s, t = (divergences.replaced(x, index, -torch.inf, here) for x in (s, t))
            elif self.want_stats:
                wants |= {"cross_t", "entropy"}
            done.update(pair_statistics(s, t, temperature, wants))
            if self.want_stats:
                for name, z in (("s", student.z), ("t", teacher.z)):
                    done["first_" + name] = z.argmax(-1).to(acc)
                    done["ztop_" + name] = z.amax(-1).to(acc)
        if self.has_label_term:
            top = student.z.amax(-1, keepdim=True)
            d = student.z - reference(top)
            done["label_top"] = top[:, 0].to(acc)
            done["label_sum"] = d.exp().sum(-1, dtype=acc)
            done["label_logit"] = self._label_logit(student.z, chunk)
            if self.smoothing:
                d = d if self.all_real else torch.where(self.real, d, 0.0)
                done["label_shift"] = d.sum(-1, dtype=acc)
                done["label_count"] = torch.ones_like(temperature) * self.real.sum()
        for name, raw in (("s", chunk.s), ("t", chunk.t)):
            if raw is not None and not (self.x_is_raw and "top_" + name in done):
                done["raw_" + name] = raw.amax(-1).to(acc)
        return done

    def term_statistics(self, chunk: _Chunk) -> Columns:
        pair, terms = self._terms(chunk)
        acc = pair.temperature.dtype
        done = {"value": terms.value.sum(-1, dtype=acc)}
        if self.want_s:
            done.update(peak_statistics(pair.p, terms.f_s, acc, "s"))
        if self.want_t:
            done.update(peak_statistics(pair.q, terms.f_t, acc, "t"))
        return done

    def _terms(self, chunk: _Chunk) -> tuple[Pair, divergences.Terms]:
        student, teacher = self.sides(chunk)
        assert teacher is not None
        pair = self.whole.part(chunk.flat).pair(student.x, teacher.x, self.temperature[chunk.flat])
        return pair, terms_of(self.divergence, self.args, pair)

    def along_statistics(self, chunk: _Chunk) -> Columns:
        student, teacher = self.sides(chunk)
        gradients = self._divergence_gradients(chunk, student, teacher)
        return {
            "along_" + name: along(grad, side)[:, 0].to(self.value.dtype)
            for name, side, grad in zip("st", (student, teacher), gradients, strict=True)
            if grad is not None and side is not None
        }

    # ------------------------------------------------------------------------------------------------- gradients
    def _divergence_gradients(
        self, chunk: _Chunk, student: Side, teacher: Side | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of the weighted divergence for x, of each side that wants one."""
        if teacher is None:
            return None, None
        flat, temperature = chunk.flat, self.temperature[chunk.flat]
        want_s, want_t = self.want_s, self.want_t
        found: tuple[Tensor | None, Tensor | None]
        if self.divergence in ("jsd", "tvd"):
            pair, terms = self._terms(chunk)
            peaks = {name: Peak(*(x[flat] for x in peak)) for name, peak in self.peaks.items()}
            found = (
                divergences.spread(pair.p, terms.f_s, temperature, peaks["s"]) if want_s else None,
                divergences.spread(pair.q, terms.f_t, temperature, peaks["t"]) if want_t else None,
            )
        else:
            whole = self.whole.part(flat)
            peak = whole.peak("s" if self.divergence == "reverse_kl" else "t", temperature, self.dtype)
            s, t = student.x, teacher.x
            if self.divergence == "decoupled":
                index, here = self.label(chunk)
                s, t = (divergences.replaced(x, index, -torch.inf, here) for x in (s, t))
                found = divergences.decoupled_gradients(
                    whole.pair(s, t, temperature), self.rest_value[flat], self.label_of["s"][flat],
                    self.label_of["t"][flat], index, (self.args[0], self.args[1]), want_s, want_t, here, peak,
                )  # fmt: skip
            elif self.divergence == "forward_kl":
                pair = whole.pair(s, t, temperature)
                found = divergences.kl_gradients(pair, self.value[flat], want_s, want_t, peak)
            else:
                pair = swapped(whole.pair(s, t, temperature))
                found = divergences.kl_gradients(pair, self.value[flat], want_t, want_s, peak)[::-1]
        weight = self.kd_weight[flat].to(self.dtype)[:, None]
        of_s, of_t = (None if g is None else g * weight for g in found)
        return of_s, of_t

    def gradients(self, chunk: _Chunk) -> tuple[Tensor | None, Tensor | None]:
        """Of the loss for the logits that are here."""
        student, teacher = self.sides(chunk)
        done: list[Tensor | None] = [None, None]
        found = self._divergence_gradients(chunk, student, teacher)
        for i, (name, side) in enumerate(zip("st", (student, teacher), strict=True)):
            grad = found[i]
            if not (self.want_s, self.want_t)[i]:
                continue
            if grad is None or side is None:
                grad = torch.zeros_like(chunk.s)
            elif self.standardize:
                grad = through_standardize(
                    grad, side, self.alongs["along_" + name][chunk.flat][:, None].to(self.dtype)
                )
            if i == 0 and self.has_label_term and self.ce_weight is not None:
                index, here = self.label(chunk)
                assert self.columns is not None
                e = (student.z - self.label_ref[chunk.flat].to(self.dtype)[:, None]).exp()
                grad = grad + label_gradient(
                    e, self.label_total[chunk.flat], self.ce_weight[chunk.flat], index, self.columns,
                    self.smoothing, here,
                )  # fmt: skip
            if side is not None:
                grad = through_softcap(grad, side)
            grad = torch.where(self.broken[chunk.flat][:, None], torch.nan, grad)
            grad = grad if self.all_real else torch.where(self.real, grad, 0.0)
            done[i] = grad[:, : self.width]
        return done[0], done[1]

    # ------------------------------------------------------------------------------------------------- the call
    def distill(self) -> tuple[Tensor, ...]:
        """As ``torch.ops.fasttransfer.distill`` returns it."""
        stats = torch.zeros(self.rows if self.want_stats else 0, len(STATS), dtype=self.value.dtype)
        stats = stats.to(self.student.device)
        losses = self._values(stats) if self.rows else torch.zeros_like(self.value)
        none = torch.ones(0, dtype=torch.float32, device=self.student.device)
        sides = [
            Gradient(torch.empty_like(x, memory_format=torch.contiguous_format), self.rows, self.width)
            if want
            else None
            for x, want in ((self.student, self.want_s), (self.teacher, self.want_t))
        ]
        if self.width and any(side is not None for side in sides):
            for chunk in self.chunks():
                for side, grad in zip(sides, self.gradients(chunk), strict=True):
                    if side is not None and grad is not None:
                        side.put(chunk.index, chunk.flat, grad)
        gradients = [
            x
            for side in sides
            for x in ((side.out, side.scale) if side is not None else (self.student.new_empty(0), none))
        ]
        loss = losses.reshape(self.leading) if self.reduction == "none" else losses.sum()
        return loss.to(self.dtype), *gradients, stats.to(self.dtype)

    def _values(self, stats: Tensor) -> Tensor:
        """Everything that needs all ranks; the losses of the rows, and into ``stats`` their statistics."""
        if self.standardize and self.distills:
            local = self.sweep(self.moment_statistics)
            self.moments = {name: combined_moments(local, name) for name in "st"}
        local = self.sweep(self.sweep_statistics)
        for name in "st":
            # No softmax can be taken of a row with a NaN or +inf, or of -inf throughout.
            top = local.get("raw_" + name, local.get("top_" + name))
            if top is not None:
                self.broken |= ~torch.isfinite(top.amax(0))
        loss = torch.zeros_like(self.value)
        if self.distills:
            self._divergence_values(local, stats)
            loss = loss + torch.where(self.kd_weight != 0, self.kd_weight * self.value, 0.0)
        if self.has_label_term and self.ce_weight is not None:
            ce, plain = self._label_values(local)
            loss = loss + torch.where(self.ce_weight != 0, self.ce_weight * ce, 0.0)
            if self.want_stats and self.labelled is not None:
                stats[:, 1] = torch.where(self.labelled, plain, 0.0)
        if self.want_stats:
            counted = (
                self.kd_weight != 0
                if self.ce_weight is None
                else (self.kd_weight != 0) | (self.ce_weight != 0)
            )
            stats.copy_(torch.where(self.broken[:, None], torch.nan, stats))
            stats.copy_(torch.where(counted[:, None], stats, 0.0))
        if self.standardize and self.distills and (self.want_s or self.want_t):
            self.alongs = {name: x.sum(0) for name, x in self.sweep(self.along_statistics).items()}
        return torch.where(self.broken, torch.nan, loss)

    def _divergence_values(self, local: Columns, stats: Tensor) -> None:
        temperature = self.temperature
        self.whole = whole = combined(local, temperature, self.dtype)
        if self.want_stats:
            every = whole
            if self.divergence == "decoupled":
                names = {n.removeprefix("whole_"): x for n, x in local.items() if n.startswith("whole_")}
                every = combined(names, temperature, self.dtype)
            stats[:, 0] = every.kl(temperature)
            stats[:, 2] = entropy_from(every.of["entropy_s"], every.of["sum_s"], temperature)
            stats[:, 3] = entropy_from(every.of["entropy_t"], every.of["sum_t"], temperature)
            owner = {name: local["ztop_" + name].argmax(0, keepdim=True) for name in "st"}
            first = {name: local["first_" + name].gather(0, owner[name]) for name in "st"}
            agrees = (owner["s"] == owner["t"]) & (first["s"] == first["t"])
            stats[:, 4] = agrees[0].to(stats.dtype)
        if self.divergence == "decoupled":
            for name, top, total in (
                ("s", whole.of["top_s"], whole.of["sum_s"]),
                ("t", whole.of["top_t"], whole.of["sum_t"]),
            ):
                of_label = local["label_" + name].sum(0)
                self.label_of[name] = divergences.label_odds(of_label, top, total, temperature)
            self.rest_value = divergences.kl_of_rest(
                whole.kl(temperature), whole.of["sum_s"], whole.of["sum_t"]
            )
            self.value = divergences.decoupled_value(
                self.rest_value, self.label_of["s"], self.label_of["t"], (self.args[0], self.args[1])
            )
        elif self.divergence in ("forward_kl", "reverse_kl"):
            self.value = whole.kl(temperature, "t" if self.divergence == "forward_kl" else "s")
        else:
            terms = self.sweep(self.term_statistics)
            self.value = terms["value"].sum(0)
            for name, want in (("s", self.want_s), ("t", self.want_t)):
                if want:
                    self.peaks[name] = combined_peak(terms, name, self.dtype)

    def _label_values(self, local: Columns) -> tuple[Tensor, Tensor]:
        assert self.columns is not None
        top = local["label_top"].amax(0)
        own, self.label_ref = reference(local["label_top"]), reference(top)
        one = torch.ones_like(top)
        factor = rescaling(own, self.label_ref, one, self.dtype)
        self.label_total = scaled(local["label_sum"], factor).sum(0)
        sum_d = None
        if self.smoothing:
            sum_d = (local["label_shift"] + local["label_count"] * (own - self.label_ref)).sum(0)
        of_label = (local["label_logit"].sum(0) - self.label_ref).to(self.dtype).to(one.dtype)
        return label_loss(self.label_total, of_label, sum_d, self.columns, self.smoothing)


def distill_shards(
    student: Tensor, teacher: Tensor, shards: Shards, args: tuple[Any, ...], want: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    """What ``torch.ops.fasttransfer.distill`` returns; ``want``: gradients of student and teacher."""
    return _Run(student, teacher, shards, args, want).distill()


class ShardedFunction(DistillFunction):
    """``loss, stats = ShardedFunction.apply(student, teacher, (shards, options))``; options as DistillFunction's.

    In them ``vocab_size`` is of the whole row, or None: all columns.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, options: tuple[Any, ...]) -> Any:  # noqa: D102
        shards, args = options
        loss, grad, scale, teacher_grad, teacher_scale, stats = distill_shards(
            student, teacher, shards, args, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(grad, scale, teacher_grad, teacher_scale)
        ctx.set_materialize_grads(False)
        return loss, stats
