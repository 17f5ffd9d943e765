"""Linear and convolutional maps from a source's features to a target's, fitted in closed form (ridge regression)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttransfer.checks import check_count, check_number, check_tensor, shape

# Rows of samples [block, in] and of what they map to [block, out], in the dtype and on the device of the data.
Blocks = Iterator[tuple[Tensor, Tensor]]

# The normal equations know a direction only by its squared singular value: of one that is below 1e-6 of the largest,
# float64 leaves less than four digits, and soon none.
_CUTOFF = 1e-12


class LinearMap(nn.Linear):
    """``y = W x + b`` on the last dimension, as ``nn.Linear``, with ``fit`` for the least-squares ``W`` and ``b``.

    A transform of ``blend`` and of features: where the source is narrower or wider than the target.

    Args:
        in_features: The size of the source's last dimension.
        out_features: The size of the target's last dimension.
        bias: Whether there is a ``b``.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def fit(self, source: Tensor, target: Tensor, *, ridge: float = 0.0, block_rows: int = 4096) -> LinearMap:
        """Set ``W`` and ``b`` to the minimiser of ``sum_i ||W x_i + b - y_i||^2 + ridge * ||W||^2``.

        The ridge of Hoerl and Kennard (1970), as in scikit-learn's ``Ridge``: the error is a sum over samples (not a
        mean), the bias is not penalised. Sums, solution and bias are float64 (which MPS lacks); the bias makes up for
        the rounding of ``W`` to the parameter's dtype. Where the minimiser is not unique (fewer samples than features,
        collinear or constant features) it is the one with the least ``||W||``; directions whose singular value is
        below 1e-6 of the largest (each feature scaled to norm 1) count as collinear.

        Args:
            source: ``[..., in_features]``, float32, bfloat16, float16 or float64. Read twice in blocks, which are
                moved to the parameters' device: it may be memory-mapped or on another device.
            target: ``[..., out_features]``, with the leading dimensions of ``source``; likewise.
            ridge: At least 0.
            block_rows: The samples converted at a time: the temporaries are ``block_rows * (in + out)`` float64
                numbers, beside the ``in * (in + out)`` of the sums.

        Returns:
            The module itself; its parameters have been written in place.

        Raises:
            TypeError: Something that is no floating tensor.
            ValueError: Shapes that do not match, no samples, NaN or infinity, a negative ridge, a solution that the
                parameters' dtype cannot hold. Nothing has been modified then.
        """
        ridge, block_rows = _check_fit(self, source, target, ridge, block_rows)
        for name, t, size in (("source", source, self.in_features), ("target", target, self.out_features)):
            if t.dim() == 0 or t.shape[-1] != size:
                hint = "; use ConvMap for feature maps" if t.dim() == 4 and t.shape[1] == size else ""
                raise ValueError(f"{name} must be [..., {size}], got {shape(t)}{hint}")
        if source.shape[:-1] != target.shape[:-1]:
            raise ValueError(
                f"target must have the leading dimensions of source, {shape(source)}, got {shape(target)}"
            )
        if source.shape[:-1].numel() == 0:
            raise ValueError(f"source must have at least one sample, got {shape(source)}")
        if source.dim() == 1:
            source, target = source[None], target[None]
        _fit(self, lambda: _rows(source, target, block_rows), ridge)
        return self


class ConvMap(nn.Conv2d):
    """A convolution from a source's feature maps to a target's, ``[N, C, H, W] -> [N, C', H', W']``, with ``fit``.

    As ``nn.Conv2d`` with an odd kernel and padding ``(k - 1) / 2``: stride 1 keeps the size.

    Args:
        in_channels: The channels of the source.
        out_channels: The channels of the target.
        kernel_size: Odd; one number or a pair (height, width).
        stride: One number or a pair.
        bias: Whether a bias is added.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: A kernel size or stride that is no integer.
        ValueError: An even kernel size; a size or stride below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        stride: int | tuple[int, int] = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = _pair("kernel_size", kernel_size)
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        padding = (kernel[0] - 1) // 2, (kernel[1] - 1) // 2
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride=_pair("stride", stride),
            padding=padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def fit(self, source: Tensor, target: Tensor, *, ridge: float = 0.0, block_rows: int = 4096) -> ConvMap:
        """Set the parameters to the minimiser of ``||conv(source) - target||^2 + ridge * ||weight||^2``.

        ``LinearMap.fit`` on the patches under the kernel (with the zeros of the padding): a sample is one position of
        the target.

        Args:
            source: ``[N, in_channels, H, W]``, as the source of ``LinearMap.fit``.
            target: ``[N, out_channels, H', W']``, of the size that this convolution gives.
            ridge: At least 0.
            block_rows: The positions whose patches are taken at a time (at least one line of a feature map).

        Returns:
            The module itself; its parameters have been written in place.

        Raises:
            TypeError, ValueError: As ``LinearMap.fit``. Nothing has been modified then.
        """
        ridge, block_rows = _check_fit(self, source, target, ridge, block_rows)
        if source.dim() != 4 or source.shape[1] != self.in_channels:
            raise ValueError(f"source must be [N, {self.in_channels}, H, W], got {shape(source)}")
        # As the padding is (k - 1) / 2:
        size = [(n - 1) // s + 1 for n, s in zip(source.shape[2:], self.stride, strict=True)]
        expected = [source.shape[0], self.out_channels, *size]
        if list(target.shape) != expected:
            raise ValueError(
                f"target must be {expected} for a source of {shape(source)}, got {shape(target)}"
            )
        if source.shape[0] * size[0] * size[1] == 0:
            raise ValueError(f"source must have at least one sample and pixel, got {shape(source)}")
        _fit(self, lambda: self._patches(source, target, block_rows), ridge)
        return self

    def _patches(self, source: Tensor, target: Tensor, block_rows: int) -> Blocks:
        """The patches of some images, or of some lines of one: ``[rows, C * kh * kw]``, the order of the weight."""
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        _, channels, height, width = target.shape
        images = max(1, block_rows // (height * width))
        lines = min(height, max(1, block_rows // width))
        padding = (kw - 1) // 2, (kw - 1) // 2, (kh - 1) // 2, (kh - 1) // 2
        for x, y in zip(source.split(images), target.split(images), strict=True):
            windows = F.pad(x, padding).unfold(2, kh, sh).unfold(3, kw, sw)  # a view [n, C, H', W', kh, kw]
            for top in range(0, height, lines):
                patches = windows[:, :, top : top + lines].permute(0, 2, 3, 1, 4, 5)
                wanted = y[:, :, top : top + lines].permute(0, 2, 3, 1)
                yield patches.reshape(-1, x.shape[1] * kh * kw), wanted.reshape(-1, channels)


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or a pair, got {value}")
    return check_count(name, pair[0]), check_count(name, pair[1])


def _check_fit(layer: nn.Module, source: Any, target: Any, ridge: Any, block_rows: Any) -> tuple[float, int]:
    """What both fits ask of their arguments, but for the shapes."""
    check_tensor("source", source)
    check_tensor("target", target)
    for name in ("weight", "bias"):
        if (
            getattr(layer, name) is not None and name not in layer._parameters
        ):  # written to, it would not change
            raise ValueError(f"the map's {name} must be a parameter, got one that is computed (weight_norm)")
    for name, t in (("source", source), ("target", target), ("the map's weight", layer.weight)):
        if t.is_meta:
            raise ValueError(f"{name} must have values, got a tensor on the meta device")
    return check_number("ridge", ridge, 0), check_count("block_rows", block_rows)


def _rows(x: Tensor, y: Tensor, rows: int) -> Blocks:
    """Blocks of at most ``rows`` samples of ``[..., in]`` and ``[..., out]``, whatever the strides.

    A reshape of the whole would copy all of a transposed tensor.
    """
    inner = x.shape[1:-1].numel()
    if inner > rows:
        for a, b in zip(x, y, strict=True):
            yield from _rows(a, b, rows)
        return
    for a, b in zip(x.split(rows // inner), y.split(rows // inner), strict=True):
        yield a.reshape(-1, x.shape[-1]), b.reshape(-1, y.shape[-1])


def _fit(layer: nn.Linear | nn.Conv2d, blocks: Callable[[], Blocks], ridge: float) -> None:
    """Write the ridge regression of the rows of ``blocks()`` into a layer's parameters."""
    with torch.no_grad():
        device, dtype = layer.weight.device, layer.weight.dtype
        mean_x, mean_y = _means(blocks(), device)
        if layer.bias is None:  # then the fit goes through the origin
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        gram = mean_x.new_zeros(len(mean_x), len(mean_x))
        cross = mean_x.new_zeros(len(mean_x), len(mean_y))
        for x, y in blocks():
            # Centred before they are multiplied: E[x^2] - E[x]^2 would cancel where a mean is large.
            centred = x.to(device, torch.float64) - mean_x
            gram.addmm_(centred.T, centred)
            cross.addmm_(centred.T, y.to(device, torch.float64) - mean_y)
        gram.diagonal().add_(ridge)
        _check_finite("source", gram, "values whose squares float64 can sum")
        _check_finite("target", cross, "values whose products with the source float64 can sum")

        weight = _solve(gram, cross).T.to(dtype)
        bias = mean_y - weight.double() @ mean_x  # of the rounded weight: no offset is left of its rounding
        bias = bias.to(dtype)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(
                f"the fitted map has values that {dtype} cannot hold: use a wider dtype or scale the data"
            )
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(bias)


def _means(blocks: Blocks, device: torch.device) -> tuple[Tensor, Tensor]:
    """The means of the rows ``[in]`` and of what they map to ``[out]``, float64."""
    first: list[Tensor] = []
    count = 0
    for block in blocks:
        x, y = (t.to(device, torch.float64) for t in block)
        if not first:
            first = [x[0].clone(), y[0].clone()]
            sums = [torch.zeros_like(t) for t in first]
        # Relative to the first row a constant feature is exactly 0, and rounding does not pass for a variation.
        for total, t, start in zip(sums, (x, y), first, strict=True):
            total.add_((t - start).sum(0))
        count += len(x)
    for name, total in zip(("source", "target"), sums, strict=True):
        _check_finite(name, total, "finite values")
    return first[0] + sums[0] / count, first[1] + sums[1] / count


def _check_finite(name: str, sums: Tensor, accepted: str) -> None:
    if not sums.isfinite().all():
        raise ValueError(f"{name} must hold {accepted}, got NaN, an infinity or larger ones")


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    """The least-norm solution ``[in, out]`` of ``gram @ w = cross`` for a positive semidefinite ``gram``, float64."""
    # With a diagonal of ones, neither the units of a feature nor the number of samples decide what is singular.
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)[:, None]
    a, b = gram / scale / scale.T, cross / scale
    factor, info = torch.linalg.cholesky_ex(a)
    if info == 0:
        # A factor that exists may still be made of rounding errors. The 1-norms bound the condition from above.
        inverse_norm = torch.linalg.matrix_norm(torch.cholesky_inverse(factor), 1)
        if torch.linalg.matrix_norm(a, 1) * inverse_norm <= 1 / _CUTOFF:
            return torch.cholesky_solve(b, factor) / scale

    values, vectors = torch.linalg.eigh(a)
    kept = values > _CUTOFF * values[-1]
    basis, inverse = vectors[:, kept], 1 / values[kept, None]
    w = basis @ (inverse * (basis.T @ b)) / scale
    # That is the least norm of the scaled features' weights. What changes no prediction of the unscaled ones:
    null = torch.linalg.qr(vectors[:, ~kept] / scale).Q
    w = w - null @ (null.T @ w)
    # Between scales that lie far apart `null` is inexact; one refinement returns what it took from the fit.
    return w + basis @ (inverse * (basis.T @ (b - a @ (scale * w)))) / scale
