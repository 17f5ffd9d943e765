"""Transforms of ``blend`` that leave nothing of the size of a target between: the target is the GEMM's accumulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from fasttransfer.checks import hides_gradient
from fasttransfer.ops.blend import BlendFunction, blend_inplace_op
from fasttransfer.weight_maps import WeightMap, along, is_pointwise

_PLAIN = frozenset({Tensor, nn.Parameter})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Product(NamedTuple):
    """``alpha * target + scale * (matrix applied to dimension dim of source, + bias)``: one GEMM, nothing between."""

    target: Tensor  # contiguous: a view where the target is channels_last
    source: Tensor
    matrix: Tensor  # [d_target, d_source]
    bias: Tensor | None  # [d_target]
    dim: int
    order: tuple[int, ...] | None  # of the target's dimensions in the view

    @property
    def reads(self) -> list[Tensor]:
        """What is read beside the target."""
        return [t for t in (self.source, self.matrix, self.bias) if t is not None]

    def result(self, alpha: float, scale: float) -> Tensor:
        """The blended tensor, differentiable."""
        if scale == 0:  # of a coefficient of 0 nothing is looked at, but a GEMM may look
            mapped = self._accumulated(0.0, 1.0)
            out: Tensor = BlendFunction.apply(1, [alpha], None, [0.0], None, [1.0], self.target, mapped)[0]
        else:
            out = self._accumulated(alpha, scale)
        return (
            out if self.order is None else out.permute(sorted(range(out.dim()), key=self.order.__getitem__))
        )

    def _accumulated(self, alpha: float, scale: float) -> Tensor:
        target, left, right, bias = self._operands()
        flat = (torch.addmm if target.dim() == 2 else torch.baddbmm)(
            target, left, right, beta=alpha, alpha=scale
        )
        if bias is not None:
            flat = flat.add_(bias, alpha=scale)
        return flat.reshape(self.target.shape)

    def overwrite(self, alpha: float, scale: float) -> None:
        """The target in place."""
        if scale == 0:
            return blend_inplace_op([self.target], [self.target], [alpha], None, [0.0], None, [1.0])
        target, left, right, bias = self._operands()
        (target.addmm_ if target.dim() == 2 else target.baddbmm_)(left, right, beta=alpha, alpha=scale)
        if bias is not None:
            target.add_(bias, alpha=scale)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of addmm, or of baddbmm for a dimension in the middle: the target is a view, and so is the matrix."""
        sizes, (width, inner) = self.target.shape, self.matrix.shape
        before, after = sizes[: self.dim].numel(), sizes[self.dim + 1 :].numel()
        target, bias = self.target, self.bias
        if after == 1:
            return target.view(before, width), self.source.reshape(before, inner), self.matrix.T, bias
        column = None if bias is None else bias[:, None]
        if before == 1:
            return target.view(width, after), self.matrix, self.source.reshape(inner, after), column
        matrices = self.matrix.expand(before, width, inner)
        return target.view(before, width, after), matrices, self.source.reshape(before, inner, after), column


class Convolved(NamedTuple):
    """The blend of a target with what a convolution of more than one position has made, which may be overwritten.

    Torch's convolutions (oneDNN, cuDNN) take no accumulator, and as a GEMM they would need the patches of the source,
    k^2 times its size: T(source) exists here, but the result takes its memory.
    """

    target: Tensor
    mapped: Tensor  # nobody else has it

    @property
    def reads(self) -> list[Tensor]:
        """What is read beside the target."""
        return [self.mapped]

    def result(self, alpha: float, scale: float) -> Tensor:
        """The blended tensor, differentiable."""
        operands = self.target, self.mapped
        complementary = scale == 1 - alpha
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in operands)):
            other = [] if complementary else [alpha]
            blend_inplace_op([self.mapped], [self.target], [scale], None, other, None, [1.0])
            return self.mapped
        if complementary and alpha not in (0, 1):  # of a coefficient of 0 nothing is looked at
            return self.mapped.lerp_(self.target, alpha)
        return BlendFunction.apply(1, [alpha], None, [scale], None, [1.0], *operands)[0]

    def overwrite(self, alpha: float, scale: float) -> None:
        """The target in place."""
        other = [] if scale == 1 - alpha else [scale]
        blend_inplace_op([self.target], [self.mapped], [alpha], None, other, None, [1.0])


def as_product(transform: Any, source: Tensor, target: Tensor) -> Product | None:
    """Of tensors of one dtype that a GEMM blends as exactly as the op would, else None.

    Of 16 bits the product would be rounded before it is added.
    """
    if isinstance(transform, WeightMap):
        return _of_weights(transform, source, target) if _as_it_is(transform, WeightMap) else None
    if isinstance(transform, Tensor):
        return _product(target, source, transform, None, source.dim() - 1)
    if _as_it_is(transform, nn.Linear):
        return _product(target, source, transform.weight, transform.bias, source.dim() - 1)
    if (
        is_pointwise(transform)
        and _as_it_is(transform, _CONVOLUTIONS)
        and source.dim() == transform.weight.dim()
    ):
        return _product(target, source, transform.weight.flatten(1), transform.bias, 1)
    return None


def as_convolved(transform: Any, mapped: Tensor, target: Tensor) -> Convolved | None:
    """Of a plain convolution whose output is as the blend is to be, else None."""
    fits = (
        not is_compiling()
        and _as_it_is(transform, _CONVOLUTIONS)
        and _alike((target, mapped))
        and mapped.stride() == target.stride()
        and not hides_gradient((target, mapped))
    )
    return Convolved(target, mapped) if fits else None


def _of_weights(maps: WeightMap, source: Tensor, target: Tensor) -> Product | None:
    """The last of the two products is blended; the first is the smaller of the two that it may be."""
    a, offset, b = maps.matrices()
    if source.dim() < 2:
        return None if a is None else _product(target, source, a, offset, 0)
    if b is None:
        return None if a is None else _product(target, source, a, None, 0)
    if a is None:
        return _product(target, source, b, None, 1)
    (rows, columns), (new_rows, new_columns) = source.shape[:2], target.shape[:2]
    fits = (
        target.shape == (a.shape[0], b.shape[0], *source.shape[2:])
        and (rows, columns) == (a.shape[1], b.shape[1])
        and _fit((target, source, a, b))
    )
    if not fits:
        return None
    if rows * new_columns * (columns + new_rows) <= new_rows * columns * (rows + new_columns):
        return _product(target, along(b, source, 1), a, None, 0)
    return _product(target, along(a, source, 0), b, None, 1)


def _product(target: Tensor, source: Tensor, matrix: Tensor, bias: Tensor | None, dim: int) -> Product | None:
    operands = [t for t in (target, source, matrix, bias) if t is not None]
    fits = (
        source.dim() > dim >= 0
        and matrix.dim() == 2
        and source.shape[dim] == matrix.shape[1]
        and target.shape == (*source.shape[:dim], matrix.shape[0], *source.shape[dim + 1 :])
        and (bias is None or bias.shape == matrix.shape[:1])
        and _fit(operands)
    )
    if not fits:
        return None
    if target.is_contiguous():
        return Product(target, source, matrix, bias, dim, None)
    order = (0, *range(2, target.dim()), 1)  # in which channels_last is contiguous
    if target.dim() < 2 or not target.permute(order).is_contiguous():
        return None
    return Product(target.permute(order), source.permute(order), matrix, bias, order.index(dim), order)


def _fit(operands: Sequence[Tensor]) -> bool:
    """Whether a GEMM takes these, the first being overwritten."""
    target = operands[0]
    if not _alike(operands):
        return False
    if not is_compiling():
        if peek_interpreter_stack() is not None:  # what torch.func wraps has no memory to compare
            return False
        if len({t.untyped_storage().data_ptr() for t in operands}) < len(operands):
            return False  # it cannot overwrite what it reads
    return target.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(
        target.device.type
    )


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether they are plain tensors of one dtype, device and layout."""
    return len({(t.dtype, t.device, t.layout) for t in tensors}) == 1 and _PLAIN.issuperset(
        map(type, tensors)
    )


def _as_it_is(module: Any, kinds: Any) -> bool:
    """Whether a module does what these kinds do, and nothing else."""
    return (
        isinstance(module, kinds)
        and any(type(module).forward is kind.forward for kind in (nn.Linear, WeightMap, *_CONVOLUTIONS))
        and "forward" not in vars(module)  # where accelerate, and others, put theirs
        and not (module._forward_hooks or module._forward_pre_hooks)
    )
