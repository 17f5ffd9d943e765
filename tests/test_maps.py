"""LinearMap and ConvMap: the fit against float64 oracles, hard data, errors, and their use as a transform of blend."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fasttransfer import ConvMap, LinearMap, blend


def data(samples=40, features=5, outputs=3, dtype=torch.float32, offset=0.0):
    """Features that are correlated, and a target that is their linear function with noise."""
    x = torch.randn(samples, features) @ torch.randn(features, features) + offset
    y = x @ torch.randn(features, outputs) + 0.3 * torch.randn(samples, outputs) + 1.5
    return x.to(dtype), y.to(dtype)


def oracle(x, y, ridge=0.0, bias=True):
    """Weight and bias by a float64 least-squares problem: the ridge as further rows, the least norm by an SVD."""
    x, y = x.double(), y.double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
    rows = torch.cat([x - mean_x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    wanted = torch.cat([y - mean_y, y.new_zeros(x.shape[1], y.shape[1])])
    weight = torch.linalg.lstsq(rows, wanted, driver="gelsd", rcond=1e-10).solution.T
    return weight, mean_y - weight @ mean_x


def patches(x, kernel, stride):
    """By F.unfold: [positions, C * kh * kw]."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return F.unfold(x.double(), kernel, padding=padding, stride=stride).transpose(1, 2).flatten(0, 1)


def assert_fitted(layer, expected, rtol=1e-6):
    weight, bias = expected
    close = {"rtol": rtol, "atol": rtol * weight.abs().max().item(), "check_dtype": False}
    torch.testing.assert_close(layer.weight.detach().flatten(1), weight, **close)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.detach(), bias, **close)


# ------------------------------------------------------------------------------------------------------ LinearMap


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.5, 100.0])
def test_ridge_regression(ridge, bias):
    x, y = data()
    layer = LinearMap(5, 3, bias)
    assert layer.fit(x, y, ridge=ridge) is layer
    assert_fitted(layer, oracle(x, y, ridge, bias))


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_means_what_it_means_in_sklearn(bias):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = data()
    theirs = linear_model.Ridge(alpha=3.0, fit_intercept=bias).fit(x.double().numpy(), y.double().numpy())
    ours = LinearMap(5, 3, bias, dtype=torch.float64).fit(x, y, ridge=3.0)
    torch.testing.assert_close(ours.weight.detach(), torch.as_tensor(theirs.coef_), rtol=1e-10, atol=1e-10)
    if bias:
        torch.testing.assert_close(ours.bias.detach(), torch.as_tensor(theirs.intercept_))


def test_it_is_the_minimum():
    """The gradient of the documented objective, by autograd, is zero."""
    x, y = data(dtype=torch.float64)
    layer = LinearMap(5, 3, dtype=torch.float64).fit(x, y, ridge=2.0)
    (F.mse_loss(layer(x), y, reduction="sum") + 2.0 * layer.weight.square().sum()).backward()
    for p in layer.parameters():
        torch.testing.assert_close(p.grad, torch.zeros_like(p), rtol=0, atol=1e-10)


@pytest.mark.parametrize("block_rows", [1, 7, 39, 40, 4096])
def test_blocks(block_rows):
    x, y = data()
    layer = LinearMap(5, 3, dtype=torch.float64).fit(x, y, ridge=0.5, block_rows=block_rows)
    assert_fitted(layer, oracle(x, y, 0.5), rtol=1e-11)


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 9), st.booleans())
def test_leading_dimensions_in_any_layout(lead, block_rows, transposed):
    x, y = data(max(1, int(torch.Size(lead).numel())))
    expected = LinearMap(5, 3, dtype=torch.float64).fit(x, y, ridge=0.5)
    x, y = x.reshape(*lead, 5), y.reshape(*lead, 3)
    if transposed:
        x = x.movedim(-1, 0).contiguous().movedim(0, -1)
    fitted = LinearMap(5, 3, dtype=torch.float64).fit(x, y, ridge=0.5, block_rows=block_rows)
    assert_fitted(fitted, (expected.weight.detach(), expected.bias.detach()), rtol=1e-10)


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_mean_costs_no_digits(offset):
    x, y = data(200, offset=offset)
    layer = LinearMap(5, 3, dtype=torch.float64).fit(x, y, block_rows=16)
    assert_fitted(layer, oracle(x, y), rtol=1e-7)


def test_the_bias_makes_up_for_the_rounded_weight():
    x, y = data(200, offset=1e4)
    layer = LinearMap(5, 3).fit(x, y)
    error = x.double() @ layer.weight.double().T + layer.bias.double() - y
    # The weight is rounded by 6e-8 of itself, times a mean of 1e4. Half an ulp of the bias remains.
    assert error.mean(0).abs().max() <= 2**-24 * layer.bias.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_fewer_samples_than_features_the_least_norm(samples, bias):
    x, y = data(samples, 8)
    layer = LinearMap(8, 3, bias, dtype=torch.float64).fit(x, y)
    assert_fitted(layer, oracle(x, y, bias=bias), rtol=1e-9)
    torch.testing.assert_close(layer(x.double()), y.double(), rtol=1e-8, atol=1e-8)
    if not bias:
        torch.testing.assert_close(layer.weight.detach(), (torch.linalg.pinv(x.double()) @ y.double()).T)


@pytest.mark.parametrize("ridge", [0.0, 1e-14])
def test_collinear_constant_and_dead_features(ridge):
    """The least norm in the units of the features, also where these differ."""
    x, y = data(60, dtype=torch.float64)
    constant = torch.tensor([0.1, 0.0]).expand(60, 2)
    x = torch.cat([x, 3.0 * x[:, :2], x[:, :1] + x[:, 1:2] / 4, constant], 1)
    for scales in (torch.ones(10), torch.tensor([1, 10, 1, 100, 1, 1, 0.1, 1, 1e3, 1])):
        layer = LinearMap(10, 3, dtype=torch.float64).fit(x * scales, y, ridge=ridge)
        assert_fitted(layer, oracle(x * scales, y), rtol=1e-7)
        assert not layer.weight[:, 8:].any()


def test_collinear_features_of_scales_that_lie_far_apart():
    """A least norm is beyond float64 there; the fit is not."""
    for _ in range(5):
        x, y = data(60, dtype=torch.float64)
        x = torch.cat([x, x[:, :3], x[:, 1:4]], 1)
        weight, bias = oracle(x, y)
        scaled = x * 10.0 ** (torch.randperm(11) - 4).double()
        layer = LinearMap(11, 3, dtype=torch.float64).fit(scaled, y)
        torch.testing.assert_close(layer(scaled), x @ weight.T + bias, rtol=1e-9, atol=1e-9)


def test_a_feature_of_a_small_scale_is_used():
    x, y = data(60, dtype=torch.float64)
    scales = torch.tensor([1, 1e-9, 1, 1e9, 1], dtype=torch.float64)
    weight, _ = oracle(x, y)
    layer = LinearMap(5, 3, dtype=torch.float64).fit(x * scales, y)
    torch.testing.assert_close(layer.weight.detach() * scales, weight, rtol=1e-8, atol=1e-8)


def test_nearly_singular_features_never_explode():
    """A Cholesky factor of the Gram matrix may exist there, made of rounding errors."""
    for noise in 10.0 ** torch.arange(-16, 0):
        x, y = data(100, dtype=torch.float64)
        x = torch.cat([x, x[:, :1] + noise * torch.randn(100, 1, dtype=torch.float64)], 1)
        layer = LinearMap(6, 3, dtype=torch.float64).fit(x, y)
        weight, bias = oracle(x, y)
        best = (x @ weight.T + bias - y).square().sum()
        without = (x[:, :5] @ oracle(x[:, :5], y)[0].T + oracle(x[:, :5], y)[1] - y).square().sum()
        error = (layer(x) - y).square().sum()
        assert error <= (best if noise >= 1e-5 else without) * (1 + 1e-6)
        assert layer.weight.abs().max() <= 2 * max(1 / noise if noise >= 1e-7 else 1, weight.abs().max())


def test_only_constant_features():
    y = torch.randn(6, 3)
    layer = LinearMap(2, 3).fit(torch.tensor([0.1, -1e4]).expand(6, 2), y)
    assert not layer.weight.any()
    torch.testing.assert_close(layer.bias.detach(), y.mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_the_data_and_of_the_parameters(dtype):
    x, y = data(dtype=dtype)
    assert_fitted(LinearMap(5, 3).fit(x, y.float(), ridge=0.1), oracle(x, y, 0.1))
    layer = LinearMap(5, 3, dtype=dtype).fit(x, y, ridge=0.1)
    assert layer.weight.dtype == dtype
    assert_fitted(layer, oracle(x, y, 0.1), rtol=2 * torch.finfo(dtype).eps + 1e-10)


def test_an_exact_relation_is_recovered():
    truth = nn.Linear(6, 4, dtype=torch.float64)
    x = torch.randn(30, 6, dtype=torch.float64)
    layer = LinearMap(6, 4, dtype=torch.float64).fit(x, truth(x))
    assert_fitted(layer, (truth.weight.detach(), truth.bias.detach()), rtol=1e-12)


def test_ridge_shrinks_the_weight_and_not_the_bias():
    x, y = data()
    norms = [LinearMap(5, 3).fit(x, y, ridge=r).weight.norm().item() for r in (0.0, 1.0, 100.0, 1e4)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.2 * norms[0]
    torch.testing.assert_close(LinearMap(5, 3).fit(x, y, ridge=1e12).bias.detach(), y.mean(0))


def test_memory_mapped_data(tmp_path):
    x, y = data()
    path = str(tmp_path / "x.bin")
    mapped = torch.from_file(path, shared=True, size=x.numel()).view(x.shape)
    mapped.copy_(x)
    assert_fitted(LinearMap(5, 3).fit(mapped, y, block_rows=8), oracle(x, y))


def test_fit_is_in_place_and_leaves_no_graph():
    x, y = data()
    before = x.clone(), y.clone()
    layer = LinearMap(5, 3, dtype=torch.float64)
    weight, version = layer.weight, layer.weight._version
    layer.fit(x.requires_grad_(), y.double())
    assert layer.weight is weight
    assert weight._version > version
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad is None
    layer.fit(
        before[0].double(), before[1].double()
    )  # float64 is not converted: its blocks are the data itself
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


class Largest(TorchDispatchMode):
    """Records the bytes of the largest storage that an operation has returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_temporaries_are_of_the_size_of_a_block():
    x, y = torch.randn(2, 500, 8), torch.randn(2, 500, 2)
    transposed = x.movedim(-1, 0).contiguous().movedim(0, -1)
    image, wanted = torch.randn(4, 2, 20, 10), torch.randn(4, 3, 20, 10)
    with Largest() as largest:
        LinearMap(8, 2).fit(x.flatten(0, 1), y.flatten(0, 1), block_rows=10)
        LinearMap(8, 2).fit(x, y, block_rows=10)
        LinearMap(8, 2).fit(transposed, y, block_rows=10)
    assert largest.bytes == 10 * 8 * 8
    with Largest() as largest:
        ConvMap(2, 3, 3).fit(image, wanted, block_rows=30)
    assert largest.bytes == 30 * (2 * 9) * 8


# -------------------------------------------------------------------------------------------------------- ConvMap


@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), ((1, 3), 1), (3, 2), ((3, 5), (2, 1)), (1, 3)])
@pytest.mark.parametrize("bias, ridge", [(True, 0.0), (True, 2.0), (False, 0.5)])
def test_convolution(kernel, stride, bias, ridge):
    layer = ConvMap(2, 3, kernel, stride=stride, bias=bias)
    x = torch.randn(6, 2, 7, 6) + 0.5
    y = torch.randn_like(layer(x)).detach() + 1.0
    assert layer.fit(x, y, ridge=ridge) is layer
    expected = oracle(
        patches(x, layer.kernel_size, layer.stride), y.movedim(1, -1).flatten(0, -2), ridge, bias
    )
    assert_fitted(layer, expected)


@pytest.mark.parametrize("block_rows", [1, 5, 6, 13, 24, 49, 10_000])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_in_blocks(block_rows, stride):
    """Parts of a line (rounded up to one), lines, images."""
    truth = nn.Conv2d(2, 3, 3, stride=stride, padding=1, dtype=torch.float64)
    x = torch.randn(5, 2, 5, 6, dtype=torch.float64)
    layer = ConvMap(2, 3, 3, stride=stride, dtype=torch.float64)
    layer.fit(x.contiguous(memory_format=torch.channels_last), truth(x), block_rows=block_rows)
    torch.testing.assert_close(layer.weight, truth.weight)
    torch.testing.assert_close(layer.bias, truth.bias)


def test_convolution_of_few_pixels_and_of_bf16():
    x, y = torch.randn(1, 4, 3, 3).bfloat16(), torch.randn(1, 2, 3, 3).bfloat16()
    layer = ConvMap(4, 2, 3, dtype=torch.float64).fit(x, y)
    assert_fitted(layer, oracle(patches(x, (3, 3), 1), y.movedim(1, -1).flatten(0, -2)), rtol=1e-8)
    torch.testing.assert_close(layer(x.double()), y.double())


# ----------------------------------------------------------------------------------------------------- as modules


@pytest.mark.parametrize("make", [lambda: LinearMap(3, 2), lambda: ConvMap(3, 2, 3, stride=2, bias=False)])
def test_they_are_modules(make):
    layer = make()
    x = torch.randn(2, 3) if isinstance(layer, LinearMap) else torch.randn(2, 3, 4, 4)
    other = make()
    other.load_state_dict(layer.state_dict())
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert type(same) is type(layer)
        assert torch.equal(same(x), layer(x))


def test_forward():
    linear, conv = LinearMap(3, 2), ConvMap(3, 2, (1, 3))
    x, image = torch.randn(4, 5, 3), torch.randn(4, 3, 6, 7)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert torch.equal(conv(image), F.conv2d(image, conv.weight, conv.bias, padding=(0, 1)))
    assert LinearMap(3, 2, False).bias is None
    assert ConvMap(3, 2, 5, stride=2)(image).shape == (4, 2, 3, 4)
    assert LinearMap(3, 2, device="meta", dtype=torch.bfloat16).weight.is_meta


def test_transforms_of_blend(backend):
    linear = LinearMap(4, 6).fit(torch.randn(9, 4), torch.randn(9, 6), ridge=1.0)
    conv = ConvMap(2, 3, 3).fit(torch.randn(2, 2, 5, 5), torch.randn(2, 3, 5, 5))
    cases = [
        (linear, torch.randn(5, 6), torch.randn(5, 4)),
        (conv, torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4)),
    ]
    for layer, target, source in cases:
        target.requires_grad_()
        blended = blend(target, source, 0.25, transform=layer)
        expected = 0.25 * target + 0.75 * layer(source)
        torch.testing.assert_close(blended, expected)
        inputs, upstream = [target, *layer.parameters()], torch.randn_like(target)
        found = torch.autograd.grad(blended, inputs, upstream)
        for grad, wanted in zip(found, torch.autograd.grad(expected, inputs, upstream), strict=True):
            torch.testing.assert_close(grad, wanted)
            assert wanted.any()


# --------------------------------------------------------------------------------------------------------- errors

NAN, INF = float("nan"), float("inf")


def ones(*shape, **options):
    return torch.ones(shape, **options)


def ending_in(value, *shape, **options):
    t = torch.eye(*shape, **options)
    t[-1, -1] = value
    return t


LINEAR_ERRORS = [
    ([[1.0] * 4], ones(1, 2), {}, TypeError, "source must be a tensor, got list"),
    (ones(3, 4), ones(3, 2).long(), {}, TypeError, "target must be float32, bfloat16, float16 or float64"),
    (ones(3, 4).to_sparse(), ones(3, 2), {}, TypeError, "source must be a dense"),
    (ones(3, 4, device="meta"), ones(3, 2), {}, ValueError, "source must have values"),
    (ones(3, 5), ones(3, 2), {}, ValueError, "source must be [..., 4], got [3, 5]"),
    (ones(3, 4), ones(3, 4), {}, ValueError, "target must be [..., 2], got [3, 4]"),
    (ones(), ones(3, 2), {}, ValueError, "source must be [..., 4], got []"),
    (ones(3, 4), ones(1, 2), {}, ValueError, "leading dimensions of source, [3, 4], got [1, 2]"),
    (ones(3, 2, 4), ones(6, 2), {}, ValueError, "leading dimensions"),
    (ones(0, 4), ones(0, 2), {}, ValueError, "at least one sample, got [0, 4]"),
    (ones(2, 0, 4), ones(2, 0, 2), {}, ValueError, "at least one sample, got [2, 0, 4]"),
    (ending_in(NAN, 3, 4), ones(3, 2), {}, ValueError, "source must hold finite values"),
    (ending_in(-INF, 3, 4), ones(3, 2), {"block_rows": 1}, ValueError, "source must hold finite values"),
    (ones(3, 4), ending_in(INF, 3, 2), {}, ValueError, "target must hold finite values"),
    (ones(3, 4), ending_in(NAN, 3, 2), {"ridge": 1.0}, ValueError, "target must hold finite values"),
    (
        ending_in(1e200, 3, 4, dtype=torch.float64),
        ones(3, 2),
        {},
        ValueError,
        "source must hold values whose",
    ),
    (
        1e20 * torch.eye(3, 4),
        1e300 * torch.eye(3, 2).double(),
        {},
        ValueError,
        "target must hold values whose",
    ),
    (1e-38 * torch.eye(3, 4), 1e4 * torch.eye(3, 2), {}, ValueError, "torch.float32 cannot hold"),
    (
        ones(1, 4, 3, 3),
        ones(1, 2),
        {},
        ValueError,
        "[..., 4], got [1, 4, 3, 3]; use ConvMap for feature maps",
    ),
    (ones(3, 4), ones(3, 2), {"ridge": -1.0}, ValueError, "ridge must be at least 0"),
    (ones(3, 4), ones(3, 2), {"ridge": NAN}, ValueError, "ridge"),
    (ones(3, 4), ones(3, 2), {"ridge": "1"}, TypeError, "ridge must be a number"),
    (ones(3, 4), ones(3, 2), {"block_rows": 0}, ValueError, "block_rows must be at least 1"),
    (ones(3, 4), ones(3, 2), {"block_rows": 2.0}, TypeError, "block_rows must be an integer"),
]
CONV_ERRORS = [
    (ones(1, 4, 3, 3, device="meta"), ones(1, 2, 2, 2), {}, ValueError, "source must have values"),
    (ones(4, 3, 3), ones(1, 2, 2, 2), {}, ValueError, "source must be [N, 4, H, W], got [4, 3, 3]"),
    (ones(1, 3, 3, 3), ones(1, 2, 2, 2), {}, ValueError, "source must be [N, 4, H, W]"),
    (ones(1, 4, 3, 3), ones(1, 2, 3, 3), {}, ValueError, "target must be [1, 2, 2, 2] for a source of"),
    (ones(2, 4, 3, 3), ones(1, 2, 2, 2), {}, ValueError, "target must be [2, 2, 2, 2] for a source of"),
    (ones(0, 4, 3, 3), ones(0, 2, 2, 2), {}, ValueError, "at least one sample"),
    (ones(1, 4, 0, 3), ones(1, 2, 0, 2), {}, ValueError, "at least one sample"),
    (ones(1, 4, 3, 3) / 0, ones(1, 2, 2, 2), {}, ValueError, "source must hold finite values"),
    (ones(1, 4, 3, 3), NAN * ones(1, 2, 2, 2), {}, ValueError, "target must hold finite values"),
    (ones(1, 4, 3, 3), ones(1, 2, 2, 2), {"ridge": -1}, ValueError, "ridge must be at least 0"),
]


@pytest.mark.parametrize(
    "make, source, target, options, error, words",
    [(lambda: LinearMap(4, 2), *case) for case in LINEAR_ERRORS]
    + [(lambda: ConvMap(4, 2, 3, stride=2), *case) for case in CONV_ERRORS],
)
def test_errors_of_a_fit_which_has_changed_nothing(make, source, target, options, error, words):
    layer = make()
    before, version = copy.deepcopy(layer.state_dict()), layer.weight._version
    with pytest.raises(error, match=re.escape(words)):
        layer.fit(source, target, **options)
    assert layer.weight._version == version
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_meta_map_has_no_values_to_write():
    with pytest.raises(ValueError, match="the map's weight must have values"):
        LinearMap(4, 2, device="meta").fit(ones(3, 4), ones(3, 2))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_cannot_be_written(weight_norm, name):
    layer = weight_norm(LinearMap(4, 2), name, dim=0 if name == "weight" else None)
    before = copy.deepcopy(dict(layer.named_parameters()))
    with pytest.raises(ValueError, match=f"the map's {name} must be a parameter"):
        layer.fit(ones(3, 4), ones(3, 2))
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


@pytest.mark.parametrize(
    "kernel, stride, error, words",
    [
        (2, 1, ValueError, "kernel_size must be odd, got 2"),
        ((3, 4), 1, ValueError, "kernel_size must be odd, got (3, 4)"),
        (0, 1, ValueError, "kernel_size must be at least 1"),
        ((3, 3, 3), 1, ValueError, "kernel_size must be an integer or a pair"),
        (3.0, 1, TypeError, "kernel_size must be an integer"),
        (3, 0, ValueError, "stride must be at least 1"),
        (3, True, TypeError, "stride must be an integer"),
    ],
)
def test_errors_of_conv_map(kernel, stride, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ConvMap(2, 3, kernel, stride=stride)
