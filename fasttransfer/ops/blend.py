"""``torch.ops.fasttransfer.blend``: weighted sums of tensors, rounded once, for a whole list in one call.

``out_i = alpha_i target_i + scale_i sum_j w_j source_ij``, scale = 1 - alpha unless given. Arithmetic in fp32 (fp64 if
an operand is), result in the target's dtype. Around the operand of the largest coefficient where the
coefficients sum to 1: equal operands then give exactly that value, and an average that has converged stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttransfer.ops.library import accumulator, compute_dtype, define

_ARGUMENTS = (
    "Tensor[] sources, float[] alpha, Tensor? alpha_tensor, "
    "float[] scale, Tensor? scale_tensor, float[] weights"
)
# sources: the sources of target 0, then those of target 1, ... ; a tensor of values is [targets], fp32 or fp64


# --------------------------------------------------------------------------------------------- pure torch
def _combine(
    target: Tensor, sources: Sequence[Tensor], alpha: Any, scale: Any, weights: Sequence[float]
) -> Tensor:
    """One target. ``alpha`` and ``scale`` are floats, or 0-dim tensors, whose values only the device looks at."""
    dtype = compute_dtype(target, *sources)
    t = target.to(dtype)
    if scale is not None:
        total = sum(_scaled(s.to(dtype), w) for s, w in zip(sources, weights, strict=True))
        return _scaled(t, alpha) + _scaled(total, scale)
    # Around the first source that counts: sources that agree give exactly what they agree on.
    counted = [(s.to(dtype), w) for s, w in zip(sources, weights, strict=True) if w]
    first = counted[0][0]
    source = first
    for s, w in counted[1:]:
        source = source + (s - first) * w
    if isinstance(alpha, Tensor):
        alpha, rest = alpha.to(dtype), (1 - alpha).to(dtype)  # 1 - 0.999 before it is rounded
        inner = torch.where(alpha >= 0.5, t + (source - t) * rest, source + (t - source) * alpha)
        return torch.where(alpha == 1, t, torch.where(alpha == 0, source, inner))
    if alpha in (0, 1):
        return t if alpha == 1 else source
    return t + (source - t) * (1 - alpha) if alpha >= 0.5 else source + (t - source) * alpha


def _scaled(x: Tensor, coef: Any) -> Any:
    """``coef * x``, where a coefficient of 0 does not look at ``x``."""
    if isinstance(coef, Tensor):
        return torch.where(coef == 0, 0.0, x * coef.to(x.dtype))
    return x if coef == 1 else x * coef if coef else torch.zeros_like(x)


def _value(constants: Sequence[float], tensor: Tensor | None, i: int) -> Any:
    if tensor is not None:
        return tensor[i]
    return constants[i] if constants else None


def _each(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    alpha: Sequence[float],
    alpha_tensor: Tensor | None,
    scale: Sequence[float],
    scale_tensor: Tensor | None,
    weights: Sequence[float],
) -> Iterator[Tensor]:
    """The combination of each target, one at a time, in the dtype of the arithmetic."""
    for name, constants, tensor in (("alpha", alpha, alpha_tensor), ("scale", scale, scale_tensor)):
        given = len(constants) if tensor is None else tensor.numel()
        if given != len(targets) and (given or name == "alpha"):
            raise ValueError(
                f"fasttransfer::blend: {name} must have one value per target ({len(targets)}), got {given}"
            )
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"fasttransfer::blend: {name} must be float32 or float64, got {tensor.dtype}")
    k = len(weights)
    for i, target in enumerate(targets):
        a, b = _value(alpha, alpha_tensor, i), _value(scale, scale_tensor, i)
        yield _combine(target, sources[i * k : (i + 1) * k], a, b, weights)


def _blend(targets: Sequence[Tensor], *args: Any) -> list[Tensor]:
    # Into the target's own order of dimensions, whichever operand's the arithmetic has taken.
    each = zip(targets, _each(targets, *args), strict=True)
    return [torch.empty_like(target).copy_(out) for target, out in each]


def _blend_(targets: Sequence[Tensor], *args: Any) -> None:
    for target, out in zip(targets, _each(targets, *args), strict=True):
        target.copy_(out)


blend_op = define(
    "blend",
    f"(Tensor[] targets, {_ARGUMENTS}) -> Tensor[]",
    _blend,
    lambda targets, *_: [torch.empty_like(t) for t in targets],
)
blend_inplace_op = define(
    "blend_", f"(Tensor(a!)[] targets, {_ARGUMENTS}) -> ()", _blend_, lambda *_: None, mutates=[0]
)
# Plain lists at the least price per tensor: one alpha for all, the sources of one model after those of the other.
# False, with nothing written, unless the kernel serves them as they are; there is no such kernel in pure torch.
blend_plain_op = define(
    "blend_plain_",
    "(Tensor(a!)[] targets, Tensor[] sources, float alpha, float[] weights) -> bool",
    lambda *_: False,
    lambda *_: False,
    mutates=[0],
)


def _blend_dot(upstream: Sequence[Tensor], terms: Sequence[Tensor], coefs: Sequence[float]) -> Tensor:
    k, dots = len(coefs), []
    for i, g in enumerate(upstream):
        row = terms[i * k : (i + 1) * k]
        dtype = compute_dtype(g, *row)
        wide = [t.to(dtype) for t in row]
        if abs(sum(coefs)) < 1e-12:  # differences first: nothing is lost where the terms are close
            base, rest = wide[0], zip(wide[1:], coefs[1:], strict=True)
            total = sum((_scaled(x - base, c) for x, c in rest), torch.zeros_like(base))
        else:
            total = sum(_scaled(x, c) for x, c in zip(wide, coefs, strict=True))
        dots.append((g.to(dtype) * total).sum(dtype=accumulator(g)))
    return torch.stack(dots)


# out[i] = sum(upstream_i * sum_j coefs_j terms_ij), the gradient of a coefficient: one pass, nothing between. Products
# in fp32 (fp64 if an operand is), summed in fp64 where the device has it. terms: as the sources of `blend`.
blend_dot_op = define(
    "blend_dot",
    "(Tensor[] upstream, Tensor[] terms, float[] coefs) -> Tensor",
    _blend_dot,
    lambda upstream, *_: upstream[0].new_empty(len(upstream), dtype=accumulator(upstream[0])),
)


# ---------------------------------------------------------------------------------------------- autograd
class BlendFunction(torch.autograd.Function):
    """``outs = BlendFunction.apply(n, alpha, alpha_tensor, scale, scale_tensor, weights, *targets, *sources)``."""

    @staticmethod
    def forward(
        ctx: Any,
        n: int,
        alpha: Sequence[float],
        alpha_tensor: Tensor | None,
        scale: Sequence[float],
        scale_tensor: Tensor | None,
        weights: Sequence[float],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """The blended tensors, one per target."""
        ctx.constants = n, alpha, scale, weights
        ctx.dtypes = [t.dtype for t in tensors]
        # The operands themselves matter only for the gradient of a coefficient.
        learned = any(t is not None and t.requires_grad for t in (alpha_tensor, scale_tensor))
        ctx.learned = learned
        ctx.save_for_backward(alpha_tensor, scale_tensor, *(tensors if learned else ()))
        ctx.set_materialize_grads(False)
        outs = tuple(blend_op(tensors[:n], tensors[n:], alpha, alpha_tensor, scale, scale_tensor, weights))
        if not learned:
            # The outputs of one Function all require grad, or none does; batch_norm takes no statistics that do.
            k = len(weights)
            rows = ((tensors[i], *tensors[n + i * k : n + (i + 1) * k]) for i in range(n))
            ctx.mark_non_differentiable(
                *(out for out, row in zip(outs, rows, strict=True) if not any(t.requires_grad for t in row))
            )
        return outs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        """In each operand; differentiable again, by torch's own operations, under create_graph."""
        n, alpha, scale, weights = ctx.constants
        alpha_tensor, scale_tensor, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        k = len(weights)
        grads: list[Tensor | None] = [None] * (n + n * k)
        for i, g in enumerate(upstream):
            if g is None:
                continue
            a, b = _value(alpha, alpha_tensor, i), _value(scale, scale_tensor, i)
            wide = g.to(torch.float64 if g.dtype == torch.float64 else torch.float32)
            if needs[i]:
                grads[i] = (wide * a).to(ctx.dtypes[i])
            for j, w in enumerate(weights):
                at = n + i * k + j
                if needs[at]:
                    grads[at] = (wide * ((1 - a if b is None else b) * w)).to(ctx.dtypes[at])
        on_alpha = on_scale = None
        if ctx.needs_input_grad[2]:
            complementary = scale_tensor is None and not scale
            coefs = [1.0, *(-w if complementary else 0.0 for w in weights)]
            on_alpha = _dots(upstream, tensors, coefs, alpha_tensor)
        if ctx.needs_input_grad[4]:
            on_scale = _dots(upstream, tensors, [0.0, *weights], scale_tensor)
        return None, None, on_alpha, None, on_scale, None, *grads


def _dots(
    upstream: Sequence[Tensor | None], tensors: Sequence[Tensor], coefs: Sequence[float], like: Tensor
) -> Tensor:
    """``sum(upstream_i * sum_j coefs_j x_ij)`` of the target and the sources of each output; 0 of an unused one."""
    n, k = len(upstream), len(coefs) - 1
    counted = [j for j, c in enumerate(coefs) if c]
    given = {i: g for i, g in enumerate(upstream) if g is not None}
    if not given or not counted:
        return torch.zeros_like(like)
    rows = [[tensors[i], *tensors[n + i * k : n + (i + 1) * k]] for i in given]
    args = (
        list(given.values()),
        [row[j] for row in rows for j in counted],
        [coefs[j] for j in counted],
    )
    twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    dots = (_blend_dot if twice else blend_dot_op)(*args).to(like.dtype)
    if len(given) == n:
        return dots
    found = dict(zip(given, dots.unbind(), strict=True))
    return torch.stack([found.get(i, torch.zeros_like(dots[0])) for i in range(n)])
