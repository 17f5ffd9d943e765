"""``torch.ops.fasttransfer.l2sp_*``: the L2-SP penalty of a list of parameters, its gradient, both in one pass.

``sum_i strength_i ||p_i - p0_i||^2`` and ``2 strength_i (p_i - p0_i)``; ``p0_i = 0`` where there is no start point.
Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (2018), eq. 3,
whose alpha/2 is ``strength`` here. ``strength`` and ``accumulate`` hold one value per tensor, or one for all.
``importance`` weighs single elements, ``sum strength_i F_i (p_i - p0_i)^2``; empty: all alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttransfer.ops.library import accumulator, compute_dtype, define

OptTensors = Sequence[Tensor | None]


# --------------------------------------------------------------------------------------------- pure torch
def difference(p: Tensor, p0: Tensor | None) -> Tensor:
    """``p - p0`` in fp32, or fp64 if either is."""
    dtype = compute_dtype(p, p0)
    return p.to(dtype) if p0 is None else p.to(dtype) - p0.to(dtype)


def _each(values: Sequence[Any], n: int) -> Sequence[Any]:
    """One value for each of n tensors, from as many or from one for all."""
    return [values[0]] * n if len(values) == 1 else values


def _total_dtype(params: Sequence[Tensor]) -> torch.dtype:
    return compute_dtype(*params)


def _weighed(d: Tensor, importance: OptTensors, i: int) -> Tensor:
    """``F d``, or d itself."""
    f = importance[i] if importance else None
    return d if f is None else d * f.to(d.dtype)


def _value(
    params: Sequence[Tensor], start: OptTensors, strength: Sequence[float], importance: OptTensors = ()
) -> Tensor:
    total = torch.zeros((), dtype=accumulator(params[0]), device=params[0].device)
    for i, (p, p0, weight) in enumerate(zip(params, start, _each(strength, len(params)), strict=True)):
        d = difference(p, p0)
        total += weight * (_weighed(d, importance, i) * d).sum(dtype=total.dtype)
    return total.to(_total_dtype(params))


def _grad(
    params: Sequence[Tensor],
    start: OptTensors,
    strength: Sequence[float],
    importance: OptTensors,
    upstream: Tensor,
) -> list[Tensor]:
    return [
        (_weighed(difference(p, p0), importance, i) * (2 * weight * upstream)).to(p.dtype)
        for i, (p, p0, weight) in enumerate(zip(params, start, _each(strength, len(params)), strict=True))
    ]


def _add_grad_(
    params: Sequence[Tensor],
    start: OptTensors,
    grads: Sequence[Tensor],
    strength: Sequence[float],
    importance: OptTensors,
    accumulate: Sequence[int],
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
) -> Tensor:
    scale: Any = grad_scale
    if grad_scale_tensor is not None:
        scale = grad_scale_tensor.reshape(()).to(accumulator(params[0]))
    total = torch.zeros((), dtype=accumulator(params[0]), device=params[0].device)
    strength, accumulate = _each(strength, len(params)), _each(accumulate, len(params))
    rows = zip(params, start, grads, strength, accumulate, strict=True)
    for i, (p, p0, g, weight, add) in enumerate(rows):
        d = difference(p, p0)
        weighed = _weighed(d, importance, i)
        total += weight * (weighed * d).sum(dtype=total.dtype)
        step = weighed * (
            2 * weight * scale
        )  # not in place: without a start point d may be the parameter itself
        g.copy_(step + g if add else step)
    return total.to(_total_dtype(params))


# ------------------------------------------------------------------------------------------------- fakes
def _fake_value(params: Sequence[Tensor], *_: Any) -> Tensor:
    return params[0].new_empty((), dtype=_total_dtype(params))


l2sp_value_op = define(
    "l2sp_value",
    "(Tensor[] params, Tensor?[] start, float[] strength, Tensor?[] importance) -> Tensor",
    _value,
    _fake_value,
)
l2sp_grad_op = define(
    "l2sp_grad",
    "(Tensor[] params, Tensor?[] start, float[] strength, Tensor?[] importance, Tensor upstream) -> Tensor[]",
    _grad,
    lambda params, start, strength, importance, upstream: [torch.empty_like(p) for p in params],
)
l2sp_add_grad_op = define(
    "l2sp_add_grad_",
    "(Tensor[] params, Tensor?[] start, Tensor(a!)[] grads, float[] strength, Tensor?[] importance, "
    "int[] accumulate, float grad_scale, Tensor? grad_scale_tensor) -> Tensor",
    _add_grad_,
    _fake_value,
    mutates=[2],
)
# Plain lists at the least price per tensor, each parameter with its start point and a gradient to add to. None, with
# nothing written, unless the kernel serves them as they are; there is no such kernel in pure torch.
l2sp_add_grad_plain_op = define(
    "l2sp_add_grad_plain_",
    "(Tensor[] params, Tensor[] start, Tensor(a!)[] grads, float strength, float grad_scale) -> Tensor?",
    lambda *_: None,
    lambda *_: None,
    mutates=[2],
)


# ---------------------------------------------------------------------------------------------- autograd
class L2SPFunction(torch.autograd.Function):
    """``penalty = L2SPFunction.apply(start, strength, importance, *params)``: gradient for the params only."""

    @staticmethod
    def forward(
        ctx: Any, start: OptTensors, strength: Sequence[float], importance: OptTensors, *params: Tensor
    ) -> Tensor:
        """The penalty, a scalar."""
        ctx.strength = strength
        constants = [*start, *importance]
        ctx.given = [t is not None for t in constants]
        ctx.weighed = bool(importance)
        ctx.save_for_backward(*params, *(t for t in constants if t is not None))
        ctx.set_materialize_grads(False)
        return l2sp_value_op(params, start, strength, importance)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        """``2 strength F (p - p0) upstream``; differentiable again, by torch's own operations, under create_graph."""
        count = len(ctx.given) // (2 if ctx.weighed else 1)
        if upstream is None:
            return (None,) * (count + 3)
        saved = ctx.saved_tensors
        rest = iter(saved[count:])
        constants = [next(rest) if given else None for given in ctx.given]
        needed = ctx.needs_input_grad[3:]
        wanted = [i for i in range(count) if needed[i]]
        importance = [constants[count + i] for i in wanted] if ctx.weighed else []
        lists = (
            [saved[i] for i in wanted],
            [constants[i] for i in wanted],
            [ctx.strength[i] for i in wanted],
            importance,
        )
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        computed = iter(_grad(*lists, upstream) if twice else l2sp_grad_op(*lists, upstream))
        return None, None, None, *(next(computed) if need else None for need in needed)
