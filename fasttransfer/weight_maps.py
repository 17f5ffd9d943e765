"""``WeightMap``: a layer's weights carried to another width, ``W_t = A W_s B^T``, by maps of its outputs and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_tensor, shape

Side = nn.Module | Tensor | None


class WeightMap(nn.Module):
    """``W -> A W B^T`` for a layer's weight and ``b -> A b + a`` for its bias: a transform of ``blend``.

    ``A`` carries the source layer's outputs to the target's, ``y_t = A y_s + a``. ``B^T`` carries the target's *inputs*
    back to the source's, ``x_s = B^T x_t``. Then ``A (W x_s + b) + a = (A W B^T) x_t + (A b + a)``: where both maps are
    exact the mapped layer computes what the source's computes. So ``outputs`` is fitted from source to target, and
    ``inputs`` from target to source::

        outputs = LinearMap(16, 24, bias=False).fit(source_outputs, target_outputs)  # features [N, 16], [N, 24]
        inputs = LinearMap(12, 8, bias=False).fit(target_inputs, source_inputs)      # [N, 12], [N, 8]
        blend_(target_layer, source_layer, 0.5, transform=WeightMap(outputs, inputs))

    A ``B`` fitted the other way, ``x_t = B x_s``, is right only if its columns are orthonormal: for features of twice
    the size ``B^T`` would double them once more. Neither does any map commute with a nonlinearity: through a ReLU only
    ``A`` whose rows have at most one entry, not negative (neurons copied, permuted, scaled), are exact.

    Widening by copying neurons, whose inputs then share the weights, is Net2WiderNet (Chen, Goodfellow and Shlens,
    "Net2Net" (2016), section 3.1) and bert2BERT (Chen et al. 2022); learned ``A`` and ``B`` (they require grad here)
    LiGO (Wang et al., "Learning to Grow Pretrained Models" (2023), section 3); fitted from features, the alignment of
    layers before their fusion, as in OTFusion (Singh and Jaggi, "Model Fusion via Optimal Transport" (2020)), by least
    squares and not by transport.

    Args:
        outputs: ``LinearMap`` or ``nn.Linear`` with a weight ``[out_target, out_source]``, a ``ConvMap`` or
            ``nn.Conv2d`` of kernel size 1 for channels, or a matrix of that shape. None: the same.
        inputs: Likewise, ``[in_source, in_target]``, without a bias: an offset of inputs is one of the layer's bias
            that depends on its weight. None: the same.

    Raises:
        TypeError: Another kind of map.
        ValueError: Both None; a matrix that has not two dimensions; a convolution with a larger kernel, a stride,
            padding or groups; ``inputs`` with a bias.
    """

    def __init__(self, outputs: Side = None, inputs: Side = None) -> None:
        super().__init__()
        if outputs is None and inputs is None:
            raise ValueError("outputs or inputs must be given, got None for both")
        for name, side in (("outputs", outputs), ("inputs", inputs)):
            _check_side(name, side)
            if isinstance(side, Tensor) and not isinstance(side, nn.Parameter):
                self.register_buffer(name, side)
            else:
                setattr(self, name, side)
        if getattr(inputs, "bias", None) is not None:
            raise ValueError(
                "inputs must have no bias, got a map with one: fit it with bias=False (the offset A W c belongs to the "
                "target layer's bias)"
            )

    def matrices(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """``A`` ``[out_target, out_source]``, ``a`` ``[out_target]`` and ``B`` ``[in_target, in_source]``."""
        inputs = _matrix(self.inputs)
        return (
            _matrix(self.outputs),
            getattr(self.outputs, "bias", None),
            None if inputs is None else inputs.T,
        )

    def forward(self, weight: Tensor) -> Tensor:
        """The mapped weight or bias, differentiable.

        Args:
            weight: ``[out_source, in_source]``, or ``[out_source, in_source, ...]`` of a convolution, whose kernel
                keeps its size (``[out_source, 1, ...]`` of a depthwise one: ``inputs`` must be None); or a bias
                ``[out_source]``, to which ``inputs`` are nothing.

        Returns:
            ``[out_target, in_target, ...]`` or ``[out_target]``.

        Raises:
            TypeError: No floating tensor.
            ValueError: A size that the maps do not take.
        """
        check_tensor("weight", weight)
        a, offset, b = self.matrices()
        if weight.dim() == 0:
            raise ValueError("weight must be [out, in, ...] or a bias [out], got a tensor without dimensions")
        if b is not None and weight.dim() > 1:
            weight = along(b, weight, 1)
        if a is not None:
            weight = along(a, weight, 0)
        return weight if offset is None or weight.dim() > 1 else weight + offset

    def extra_repr(self) -> str:
        """The shapes of matrices, which are no modules."""
        sides = (("outputs", self.outputs), ("inputs", self.inputs))
        return ", ".join(
            f"{name}={shape(s) if isinstance(s, Tensor) else 'None'}"
            for name, s in sides
            if not isinstance(s, nn.Module)
        )


def is_pointwise(layer: Any) -> bool:
    """Whether a convolution is a matrix over the channels of each position."""
    return (
        isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and {*layer.kernel_size, *layer.stride, layer.groups} == {1}
        and layer.padding not in ("same", "valid")
        and not any(layer.padding)
    )


def _check_side(name: str, side: Any) -> None:
    if isinstance(side, Tensor):
        check_tensor(name, side)
        if side.dim() != 2:
            raise ValueError(f"{name} must be a matrix, got shape {shape(side)}")
    elif isinstance(side, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if not is_pointwise(side):
            raise ValueError(
                f"{name} must be a convolution of kernel size 1 without stride, padding or groups, got {side}"
            )
    elif side is not None and not isinstance(side, nn.Linear):
        raise TypeError(f"{name} must be a LinearMap, a ConvMap, a matrix or None, got {type(side).__name__}")


def _matrix(side: Any) -> Tensor | None:
    return side if side is None or isinstance(side, Tensor) else side.weight.flatten(1)


def along(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """``matrix`` ``[new, old]`` applied to the first or the second dimension of a weight."""
    if x.shape[dim] != matrix.shape[1]:
        side = ("outputs", "inputs")[dim]
        raise ValueError(
            f"{side} map {matrix.shape[1]} of the source to {matrix.shape[0]} of the target, dimension {dim} of the "
            f"source's weight is {x.shape[dim]} ({shape(x)})"
        )
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    x, matrix = x.to(dtype), matrix.to(dtype)
    if dim == 0:
        return (matrix @ x.flatten(1)).reshape(len(matrix), *x.shape[1:]) if x.dim() > 1 else matrix @ x
    return (
        x @ matrix.T if x.dim() == 2 else (matrix @ x.flatten(2)).reshape(len(x), len(matrix), *x.shape[2:])
    )
