"""``torch.ops.fasttransfer.l2sp_*``: the L2-SP penalty of a list of parameters, its gradient, both in one pass.

``sum_i strength_i ||p_i - p0_i||^2`` and ``2 strength_i (p_i - p0_i)``; ``p0_i = 0`` where there is no start point.
Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks" (2018), eq. 3,
whose alpha/2 is ``strength`` here. ``strength`` and ``accumulate`` hold one value per tensor, or one for all.
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


def _value(params: Sequence[Tensor], start: OptTensors, strength: Sequence[float]) -> Tensor:
    total = torch.zeros((), dtype=accumulator(params[0]), device=params[0].device)
    for p, p0, weight in zip(params, start, _each(strength, len(params)), strict=True):
        total += weight * difference(p, p0).square().sum(dtype=total.dtype)
    return total.to(_total_dtype(params))


def _grad(
    params: Sequence[Tensor], start: OptTensors, strength: Sequence[float], upstream: Tensor
) -> list[Tensor]:
    return [
        (difference(p, p0) * (2 * weight * upstream)).to(p.dtype)
        for p, p0, weight in zip(params, start, _each(strength, len(params)), strict=True)
    ]


def _add_grad_(
    params: Sequence[Tensor],
    start: OptTensors,
    grads: Sequence[Tensor],
    strength: Sequence[float],
    accumulate: Sequence[int],
    grad_scale: float,
    grad_scale_tensor: Tensor | None,
) -> Tensor:
    scale: Any = grad_scale
    if grad_scale_tensor is not None:
        scale = grad_scale_tensor.reshape(()).to(accumulator(params[0]))
    total = torch.zeros((), dtype=accumulator(params[0]), device=params[0].device)
    strength, accumulate = _each(strength, len(params)), _each(accumulate, len(params))
    for p, p0, g, weight, add in zip(params, start, grads, strength, accumulate, strict=True):
        d = difference(p, p0)
        total += weight * d.square().sum(dtype=total.dtype)
        step = d * (2 * weight * scale)  # not in place: without a start point d may be the parameter itself
        g.copy_(step + g if add else step)
    return total.to(_total_dtype(params))


# ------------------------------------------------------------------------------------------------- fakes
def _fake_value(params: Sequence[Tensor], *_: Any) -> Tensor:
    return params[0].new_empty((), dtype=_total_dtype(params))


l2sp_value_op = define(
    "l2sp_value", "(Tensor[] params, Tensor?[] start, float[] strength) -> Tensor", _value, _fake_value
)
l2sp_grad_op = define(
    "l2sp_grad",
    "(Tensor[] params, Tensor?[] start, float[] strength, Tensor upstream) -> Tensor[]",
    _grad,
    lambda params, start, strength, upstream: [torch.empty_like(p) for p in params],
)
l2sp_add_grad_op = define(
    "l2sp_add_grad_",
    "(Tensor[] params, Tensor?[] start, Tensor(a!)[] grads, float[] strength, int[] accumulate, float grad_scale, "
    "Tensor? grad_scale_tensor) -> Tensor",
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
    """``penalty = L2SPFunction.apply(start, strength, *params)``: gradient for the params, start is a constant."""

    @staticmethod
    def forward(ctx: Any, start: OptTensors, strength: Sequence[float], *params: Tensor) -> Tensor:
        """The penalty, a scalar."""
        ctx.strength = strength
        ctx.has_start = [p0 is not None for p0 in start]
        ctx.save_for_backward(*params, *(p0 for p0 in start if p0 is not None))
        ctx.set_materialize_grads(False)
        return l2sp_value_op(params, start, strength)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> Any:
        """``2 strength (p - p0) upstream``; differentiable again, by torch's own operations, under create_graph."""
        count = len(ctx.has_start)
        if upstream is None:
            return (None,) * (count + 2)
        saved = ctx.saved_tensors
        given = iter(saved[count:])
        start = [next(given) if has else None for has in ctx.has_start]
        needed = ctx.needs_input_grad[2:]
        wanted = [i for i in range(count) if needed[i]]
        lists = [saved[i] for i in wanted], [start[i] for i in wanted], [ctx.strength[i] for i in wanted]
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        computed = iter(_grad(*lists, upstream) if twice else l2sp_grad_op(*lists, upstream))
        return None, None, *(next(computed) if need else None for need in needed)
