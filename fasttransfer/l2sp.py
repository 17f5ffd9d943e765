"""The L2-SP penalty: fine-tuning pulled towards its starting point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttransfer import fast_lists
from fasttransfer.checks import (
    all_usable,
    check_number,
    check_tensor,
    hides_gradient,
    shape,
    values_visible,
)
from fasttransfer.l2sp_sharded import add_grad_over_ranks_, is_split, parts_here, value_over_ranks
from fasttransfer.l2sp_stream import StreamedL2SPFunction, blocks, outside_of_graphs, streamed_value, total
from fasttransfer.memory import written_once
from fasttransfer.names import Collection, Tensors, collect, match
from fasttransfer.ops.blend import blend_inplace_op
from fasttransfer.ops.l2sp import L2SPFunction, difference, l2sp_add_grad_op, l2sp_value_op
from fasttransfer.ops.library import compute_dtype
from fasttransfer.sharded_params import count_writes


def l2sp_penalty(
    params: Tensors, start: Tensors, strength: float, *, importance: Tensors | None = None
) -> Tensor:
    r"""``strength * sum F (p - p0)^2``, differentiable in ``params``; F = 1 unless there is an importance.

    Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (2018),
    eq. 3, without its 1/2: the paper's alpha is ``2 * strength``. The gradient is ``2 * strength * (p - p0)``, 0 at
    the start point. Inside a training loop ``l2sp_add_grad_`` does the same without a graph, in one pass.

    Args:
        params: A list, dict or module (or one tensor), of float32, bfloat16, float16 or float64 tensors. Of DTensors
            every rank works on its part, and one number is exchanged for the value (docs/parallel.md).
        start: The start points, matched by position, length and shape (list) or by name and shape (dict, module).
            Constants: no gradient flows to them. Their dtypes may differ from the parameters'.
        strength: The lambda, at least 0.
        importance: F, a weight per element, matched as ``start`` is: such as ``fisher_importance`` gives (elastic
            weight consolidation, Kirkpatrick et al. 2017, eq. 3). At least 0 (values are checked on the CPU).

    Returns:
        A scalar, float32 (float64 if any parameter is): accumulated in fp32 blocks and float64 sums.

    Raises:
        TypeError: Something that is no tensor, or of another dtype; a strength that is no number.
        ValueError: Names, lengths, shapes or devices that do not match (the error names the parameter and both
            shapes), the same tensor twice, a negative strength.
    """
    return penalty_of(_check_pairs(params, start, check_number("strength", strength, 0), importance))


def l2sp_add_grad_(
    params: Tensors,
    start: Tensors,
    strength: float,
    *,
    importance: Tensors | None = None,
    grad_scale: float | Tensor | None = None,
) -> Tensor:
    """Add the penalty's gradient to ``p.grad`` and return the penalty: one pass over the list, no graph.

    ``p.grad += grad_scale * 2 * strength * F * (p - p0)``. Where ``p.grad`` is None it is written. Call it between
    ``backward()`` and ``optimizer.step()``, once per optimizer step: after ``scaler.unscale_`` and the all-reduce of
    gradients, before gradient clipping. Tensors that do not require grad (frozen) are skipped.

    Args:
        params: As in ``l2sp_penalty``.
        start: As in ``l2sp_penalty``.
        strength: As in ``l2sp_penalty``.
        importance: As in ``l2sp_penalty``.
        grad_scale: Multiplies the gradient only, for gradients that are still scaled by a ``GradScaler``: a number
            or a one-element float tensor (read on its device, without a synchronisation). Default 1.

    Returns:
        The unscaled penalty, a detached scalar, float32 (float64 if any parameter is).

    Raises:
        TypeError, ValueError: As ``l2sp_penalty``; also for a sparse gradient, or gradients that overlap in
            memory. Nothing has been modified then.
    """
    if isinstance(params, Iterator):
        params = list(params)
    if importance is None and fast_lists.undisturbed():
        value = fast_lists.l2sp_add_grad_(params, start, strength, grad_scale)
        if value is not None:
            return value
    pairs = _check_pairs(params, start, check_number("strength", strength, 0), importance)
    return add_grad_of_(pairs.trained(), grad_scale)


def l2sp_prox_(params: Tensors, start: Tensors, strength: float, lr: float) -> None:
    """The proximal step of the penalty, in place: ``p = (p + h p0) / (1 + h)`` with ``h = 2 * lr * strength``.

    The minimiser of ``strength * ||x - p0||^2 + ||x - p||^2 / (2 lr)`` (Parikh and Boyd, "Proximal Algorithms"
    (2014), section 6.1.1): stable for any ``h``, and not rescaled by an adaptive optimizer. Call it after
    ``optimizer.step()`` in place of the gradient. Tensors that do not require grad (frozen) are skipped.

    Args:
        params: As in ``l2sp_penalty``.
        start: As in ``l2sp_penalty``.
        strength: As in ``l2sp_penalty``.
        lr: The step size of the optimizer, at least 0.

    Raises:
        TypeError, ValueError: As ``l2sp_penalty``; also for a parameter whose elements overlap in memory.
    """
    step = check_number("lr", lr, 0)
    prox_of_(_check_pairs(params, start, check_number("strength", strength, 0)).trained(), step)


class Selection(NamedTuple):
    """Parameters with their start points (None: 0) and strengths."""

    names: list[str]
    label: Callable[[str], str]  # what an error calls a name
    params: list[Tensor]
    start: list[Tensor | None]
    strength: list[float]
    importance: list[Tensor | None]  # one each, or none at all
    away: bool = False  # whether start points or importances are on another device than the parameters

    def trained(self) -> Selection:
        """Without what is frozen."""
        return self.part([p.requires_grad for p in self.params])

    def part(self, kept: Sequence[bool]) -> Selection:
        """Those that are marked."""
        if all(kept):
            return self
        names, params, start, strength, importance = (
            [x for x, keep in zip(column, kept, strict=True) if keep] if column else []
            for column in (self.names, self.params, self.start, self.strength, self.importance)
        )
        return Selection(names, self.label, params, start, strength, importance, self.away)  # type: ignore[arg-type]

    def here(self) -> Iterable[tuple[slice, list[Tensor | None], list[Tensor | None]]]:
        """Runs of the list with their start points and importances on the parameters' device, until the next."""
        if not (self.away and self.params):
            return [(slice(None), self.start, self.importance)]
        runs = blocks(self.params, self.start, self.importance)
        return ((run, start, importance) for run, (start, importance) in runs)


def _check_pairs(
    params: Tensors, start: Tensors, strength: float, importance: Tensors | None = None
) -> Selection:
    given, points = collect("params", params), collect("start", start)
    if not given.tensors:
        raise ValueError("params holds no tensors")
    starts = match(given, points)
    seen: dict[int, str] = {}
    fine = all_usable([*given.tensors.values(), *starts])
    for (name, p), p0 in zip(given.tensors.items(), starts, strict=True):
        if not fine:
            check_tensor(given.label(name), p)
            check_tensor(points.label(name), p0)
        if seen.setdefault(id(p), name) is not name:
            raise ValueError(
                f"params holds the same tensor twice: {given.label(seen[id(p)])}, {given.label(name)}"
            )
    names, tensors = list(given.tensors), list(given.tensors.values())
    weights = [] if importance is None else _check_importance(given, collect("importance", importance))
    return Selection(names, given.label, tensors, list(starts), [strength] * len(names), weights)


def _check_importance(given: Collection, found: Collection) -> list[Tensor | None]:
    weights = match(given, found)
    for name, f in zip(given.tensors, weights, strict=True):
        check_tensor(found.label(name), f)
        if f.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{found.label(name)} requires grad, but it is a constant: pass it detached")
        if values_visible(f) and bool((f < 0).any()):
            raise ValueError(f"{found.label(name)} must be at least 0, got {f.min().item():g}")
    return list(weights)


def penalty_of(selected: Selection) -> Tensor:
    """The penalty of a selection, differentiable."""
    params, start, strength, importance, away = selected[2:]
    if not params:
        return torch.zeros(())
    if is_split(selected):
        return value_over_ranks(selected, penalty_of)
    if hides_gradient(params) or (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
        if away:
            return outside_of_graphs(StreamedL2SPFunction.apply, start, strength, importance, *params)
        return L2SPFunction.apply(start, strength, importance, *params)
    lists = params, start, strength, importance
    return outside_of_graphs(streamed_value, *lists) if away else l2sp_value_op(*lists)


@torch.no_grad()
def add_grad_of_(
    selected: Selection, grad_scale: float | Tensor | None, *, over_ranks: bool = True
) -> Tensor:
    """Its gradient, added to the parameters'; the penalty, without ``over_ranks`` of what is here."""
    params, start, importance = selected.params, selected.start, selected.importance
    if isinstance(grad_scale, Tensor):
        check_tensor("grad_scale", grad_scale)
        if grad_scale.numel() != 1:
            raise ValueError(
                f"grad_scale must be a number or a one-element tensor, got shape {shape(grad_scale)}"
            )
        scale_tensor = grad_scale if grad_scale.dtype == torch.float64 else grad_scale.float()
        scale = 1.0
    else:
        scale_tensor = None
        scale = 1.0 if grad_scale is None else check_number("grad_scale", grad_scale, 0)
    if not params:
        return torch.zeros(())
    if is_split(selected):
        return add_grad_over_ranks_(selected, lambda here: add_grad_of_(here, grad_scale), over_ranks)
    grads: list[Tensor] = []
    accumulate: list[int] = []
    for name, p in zip(selected.names, params, strict=True):
        if not p.is_leaf:
            raise ValueError(
                f"{selected.label(name)} is not a leaf: it keeps no .grad to add to. Use l2sp_penalty"
            )
        g = p.grad
        if g is not None and g.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {selected.label(name)} must be dense (strided), got layout {g.layout}"
            )
        grads.append(_new_grad(p) if g is None else g)
        accumulate.append(int(g is not None))
    if not torch.compiler.is_compiling():
        labels = [f"the gradient of {selected.label(name)}" for name in selected.names]
        columns = [params, start, importance] if importance else [params, start]
        read = [[t for t in row if t is not None] for row in zip(*columns, strict=True)]
        written_once(labels, grads, read, [object() for _ in labels])
    given = selected, grads, accumulate, scale, scale_tensor
    value = outside_of_graphs(_add_grad_, *given) if selected.away else _add_grad_(*given)
    for p, g, had in zip(params, grads, accumulate, strict=True):
        if not had:
            p.grad = g
    return value


def _new_grad(p: Tensor) -> Tensor:
    """Where a first gradient is written: in the dtype that the parameter takes (``grad_dtype``, since torch 2.10)."""
    dtype = None if torch.compiler.is_compiling() else getattr(p, "grad_dtype", None)
    return torch.empty_like(p, dtype=dtype or p.dtype)


def _add_grad_(
    selected: Selection,
    grads: list[Tensor],
    accumulate: list[int],
    scale: float,
    scale_tensor: Tensor | None,
) -> Tensor:
    values = []
    for run, start, importance in selected.here():
        rows = selected.params[run], start, grads[run], selected.strength[run], importance, accumulate[run]
        values.append(l2sp_add_grad_op(*rows, scale, scale_tensor))
    return total(values)


@torch.no_grad()
def prox_of_(selected: Selection, lr: float | Sequence[float]) -> None:
    """``(p + h p0)/(1 + h)`` is a blend with ``1/(1 + h)`` on ``p``; without a start point, of ``p`` and nothing."""
    if is_split(selected):
        prox_of_(parts_here(selected), lr)
        return count_writes(selected.params)
    if not torch.compiler.is_compiling():
        labels = [selected.label(name) for name in selected.names]
        columns = [selected.start, selected.importance] if selected.importance else [selected.start]
        rows = [[t for t in row if t is not None] for row in zip(*columns, strict=True)]
        written_once(labels, selected.params, rows, [object() for _ in labels])
    sizes = [lr] * len(selected.params) if isinstance(lr, float) else list(lr)
    steps = [2 * size * weight for size, weight in zip(sizes, selected.strength, strict=True)]
    if selected.away:
        return outside_of_graphs(_prox_, selected, steps)
    _prox_(selected, steps)


def _prox_(selected: Selection, steps: list[float]) -> None:
    for run, start, importance in selected.here():
        _prox_run_(selected.params[run], start, importance, steps[run])


def _prox_run_(
    params: list[Tensor], start: list[Tensor | None], importance: list[Tensor | None], steps: list[float]
) -> None:
    weighed = [f is not None for f in importance] or [False] * len(steps)
    for has_start in (True, False):
        chosen = [i for i, p0 in enumerate(start) if (p0 is not None) == has_start and not weighed[i]]
        if chosen:
            targets, kept = [params[i] for i in chosen], [1 / (1 + steps[i]) for i in chosen]
            sources: Any = [start[i] for i in chosen] if has_start else targets
            blend_inplace_op(
                targets, sources, kept, None, [] if has_start else [0.0] * len(kept), None, [1.0]
            )
    for i, (p, p0) in enumerate(zip(params, start, strict=True)):
        if weighed[i]:
            # Element by element, around what counts more: the other's rounding errors stay small.
            f = importance[i]
            assert f is not None
            assert p0 is not None
            dtype = compute_dtype(p, p0, f)
            h = min(steps[i], torch.finfo(dtype).max) * f.to(dtype)
            share, d = 1 / (1 + h), difference(p, p0).to(dtype)
            p.copy_(torch.where(share < 0.5, p0.to(dtype) + share * d, p.to(dtype) - h * share * d))
