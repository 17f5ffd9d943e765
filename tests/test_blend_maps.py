"""Transforms that are one product with the blend: convolutions of features, maps of weights of another width."""

import re

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

from fasttransfer import ConvMap, LinearMap, WeightMap, blend, blend_
from fasttransfer.products import Convolved, Product, as_convolved, as_product

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
LAST = torch.channels_last


def conv(case, dtype=F32):
    """A transform and the sizes of source and target."""
    options = {
        "point": (1, 1),
        "point, no bias": (1, 1),
        "3x3": (3, 1),
        "stride": (3, 2),
        "point, stride": (1, 2),
    }
    kernel, stride = options[case]
    layer = ConvMap(5, 4, kernel, stride=stride, bias="no bias" not in case, dtype=dtype)
    return layer, (2, 5, 6, 7), (2, 4, *layer(torch.zeros(2, 5, 6, 7, dtype=dtype)).shape[2:])


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["point", "point, no bias", "3x3", "stride", "point, stride"])
def test_convolutions_of_features(backend, case, layout):
    """Result, in place and all gradients are those of the two steps in float64."""
    for dtype in (F32, F64, BF16):
        layer, source_shape, target_shape = conv(case, dtype)
        wide = conv(case, F64)[0]
        wide.load_state_dict(layer.state_dict())
        t, s = (torch.randn(x).to(dtype, memory_format=layout) for x in (target_shape, source_shape))
        bound = {F32: (2e-6, 2e-5), F64: (1e-12, 1e-12), BF16: (3e-2, 3e-2)}[dtype]
        bound = dict(zip(("rtol", "atol"), bound, strict=True))
        for alpha, scale in ((0.3, None), (0.75, None), (0.0, None), (1.0, None), (1.0, 1.0), (-0.5, 2.0)):
            leaves = [t.clone().requires_grad_(), s.clone().requires_grad_()]
            exact = [x.detach().double().requires_grad_() for x in leaves]
            out = blend(*leaves, alpha, source_scale=scale, transform=layer)
            expected = alpha * exact[0] + (1 - alpha if scale is None else scale) * wide(exact[1])
            assert (out.dtype, out.stride()) == (dtype, t.stride())
            torch.testing.assert_close(out.double(), expected, **bound)
            with torch.no_grad():
                other = blend(t, s, alpha, source_scale=scale, transform=layer)
            torch.testing.assert_close(other.double(), expected, **bound)
            upstream = torch.randn_like(out)
            found = torch.autograd.grad(out, [*leaves, *layer.parameters()], upstream)
            wanted = torch.autograd.grad(expected, [*exact, *wide.parameters()], upstream.double())
            for x, y in zip(found, wanted, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=bound["rtol"], atol=20 * bound["atol"])
            inplace = t.clone(memory_format=torch.preserve_format)
            assert blend_(inplace, s, alpha, source_scale=scale, transform=layer) is inplace
            torch.testing.assert_close(inplace.double(), expected, **bound)


@pytest.mark.parametrize(
    "case", ["point", "3x3", "weight", "kernel", "bias", "outputs", "inputs of a kernel"]
)
def test_gradients(backend, case):
    """Also where alpha is learned, which no product takes."""
    a, b, offset = (torch.randn(x, dtype=F64, requires_grad=True) for x in ((4, 3), (2, 5), (4,)))
    shapes = {
        "weight": (3, 2),
        "kernel": (3, 2, 3, 1),
        "bias": (3,),
        "outputs": (3, 2),
        "inputs of a kernel": (3, 2, 3),
    }

    def map_of(weights):
        if case in ("point", "3x3"):
            return lambda_conv(*weights)
        linear = LinearMap(3, 4, dtype=F64)
        del linear.weight, linear.bias
        linear.weight, linear.bias = weights[0], weights[1]
        outputs, inputs = linear, weights[2]
        return WeightMap(None if "inputs" in case else outputs, None if case == "outputs" else inputs)

    def lambda_conv(weight, bias):
        layer = ConvMap(2, 3, weight.shape[2:], dtype=F64)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return layer

    if case in ("point", "3x3"):
        size = 1 if case == "point" else 3
        weights = [torch.randn(3, 2, size, size, dtype=F64), torch.randn(3, dtype=F64)]
        source, target = torch.randn(2, 2, 3, 4, dtype=F64), torch.randn(2, 3, 3, 4, dtype=F64)
    else:
        weights = [a, offset, b]
        source = torch.randn(shapes[case], dtype=F64)
        target = torch.randn_like(map_of(weights)(source))
    leaves = [x.detach().requires_grad_() for x in (target, source, *weights)]

    def blended(t, s, *w):
        return blend(t, s, 0.3, transform=map_of(w))

    def learned(t, s, alpha, *w):
        return blend(t, s, alpha, transform=map_of(w))

    alpha = torch.tensor(0.3, dtype=F64, requires_grad=True)
    assert gradcheck(blended, leaves)
    assert gradcheck(learned, [*leaves[:2], alpha, *leaves[2:]])


@pytest.mark.parametrize("sides", ["both", "outputs", "inputs"])
@pytest.mark.parametrize("layout", ["matrix", "kernel", "channels_last", "kernel1d", "bias"])
def test_maps_of_weights(backend, layout, sides):
    """A W B^T per position of the kernel, A b + a, in both orders of the products, against einsum in float64."""
    for new_out, new_in in ((9, 4), (3, 11)):
        outputs = None if sides == "inputs" else LinearMap(6, new_out)
        inputs = None if sides == "outputs" else torch.randn(5, new_in)
        maps = WeightMap(outputs, inputs)
        s = torch.randn({"matrix": (6, 5), "kernel1d": (6, 5, 3), "bias": (6,)}.get(layout, (6, 5, 3, 2)))
        if layout == "channels_last":
            s = s.to(memory_format=LAST)
        exact = s.double()
        if outputs is not None:
            exact = torch.einsum("ab,b...->a...", outputs.weight.double(), exact)
            exact = exact + outputs.bias.double() if layout == "bias" else exact
        if inputs is not None and layout != "bias":
            exact = torch.einsum("oi...,ij->oj...", exact, inputs.double())
        t = torch.randn(exact.shape)
        if layout == "channels_last":
            t = t.to(memory_format=LAST)
        torch.testing.assert_close(maps(s).double(), exact, rtol=1e-5, atol=1e-5)
        expected = 0.25 * t.double() + 0.75 * exact
        found = blend(t, s, 0.25, transform=maps)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert found.stride() == t.stride()
        inplace = t.clone(memory_format=torch.preserve_format)
        torch.testing.assert_close(blend_(inplace, s, 0.25, transform=maps), found.detach())
        mixed = blend(t.bfloat16(), s.double(), 0.25, transform=maps)
        torch.testing.assert_close(mixed.double(), expected, rtol=2e-2, atol=2e-2)


def allocated(call):
    """The bytes that torch's operations take in a call, all of them, and its result."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = call()
    return sum(
        max(0, e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"
    ), out


@torch.no_grad()
def test_nothing_of_the_targets_size_is_between():
    """The result is all that is allocated; nothing in place; a larger kernel's output becomes the result."""
    t, s = torch.randn(8, 64, 20, 20), torch.randn(8, 32, 20, 20)
    point, large = ConvMap(32, 64), nn.Conv2d(32, 64, 3, padding=1)
    weight, source = torch.randn(64, 500), torch.randn(64, 500)
    maps = WeightMap(torch.randn(64, 64))
    for target, given, transform in (
        (t, s, point),
        (weight, source, maps),
        (weight, source, torch.randn(500, 500)),
    ):
        assert type(as_product(transform, given, target)) is Product
        bytes_taken, out = allocated(lambda a=target, b=given, m=transform: blend(a, b, 0.5, transform=m))
        assert bytes_taken < 1.1 * out.nbytes
        inplace = target.clone()
        assert (
            allocated(lambda a=inplace, b=given, m=transform: blend_(a, b, 0.5, transform=m))[0]
            < 0.1 * out.nbytes
        )
    assert type(as_convolved(large, large(s), t)) is Convolved
    alone, _ = allocated(lambda: large(s))
    assert allocated(lambda: blend(t, s, 0.5, transform=large))[0] < alone + 0.1 * t.nbytes


def test_what_is_no_product(backend):
    """Hooks, subclasses with a forward of their own, memory that is read and written: the result is the same."""
    s, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    hooked = ConvMap(4, 4)
    hooked.register_forward_hook(lambda module, args, out: out + 1)

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    patched, point = ConvMap(4, 4), ConvMap(4, 4)
    patched.forward = lambda x: point(x) - 1  # as accelerate does
    for layer in (hooked, Own(4, 4, 1), Own(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2), patched):
        torch.testing.assert_close(blend(t, s, 0.25, transform=layer), 0.25 * t + 0.75 * layer(s))
    layer = ConvMap(4, 4, bias=False)
    expected = 0.25 * s + 0.75 * layer(s).detach()
    torch.testing.assert_close(blend_(s, s, 0.25, transform=layer), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert blend(t, t.clone(), 0.25, transform=layer).dtype == F32


class Halved(WeightMap):
    def forward(self, weight):
        return super().forward(weight) / 2


@pytest.mark.parametrize("inplace", [False, True])
def test_sizes_and_values_at_the_edge(backend, inplace):
    """Widths of 0; one dimension with a stride; a forward of a WeightMap's own; a source that counts nothing."""
    call = blend_ if inplace else blend
    a, b, point = torch.randn(4, 5), torch.randn(3, 2), ConvMap(5, 4)
    for target, source, transform in (
        (torch.randn(4, 0), torch.randn(5, 0), WeightMap(a)),
        (torch.randn(4, 2, 3), torch.randn(0, 3, 3), WeightMap(torch.randn(4, 0), b)),
        (torch.randn(0, 2, 3), torch.randn(5, 3, 3), WeightMap(torch.randn(0, 5), b)),
        (torch.randn(3, 4), torch.randn(3, 0), torch.randn(4, 0)),
        (torch.randn(3, 0), torch.randn(3, 5), torch.randn(0, 5)),
        (torch.randn(8)[::2], torch.randn(5), a),
        (torch.randn(8)[::2], torch.randn(5), WeightMap(a)),
        (torch.randn(4, 2), torch.randn(5, 3), Halved(a, b)),
    ):
        mapped = source @ transform.T if isinstance(transform, torch.Tensor) else transform(source)
        expected = 0.25 * target + 0.75 * mapped
        torch.testing.assert_close(call(target, source, 0.25, transform=transform), expected)
    with torch.no_grad():
        point.bias[0] = torch.nan
    kernel = torch.full((5, 3, 3), torch.nan)
    for layout in (torch.contiguous_format, LAST):
        t, s = torch.randn(2, 4, 3, 3).to(memory_format=layout), torch.full((2, 5, 3, 3), torch.nan)
        assert torch.equal(call(t.clone(), s, 1.0, transform=point), t)
        assert torch.equal(call(t.clone(), s, 0.5, source_scale=0.0, transform=point), 0.5 * t)
    t = torch.randn(4, 2, 3)
    assert torch.equal(call(t.clone(), kernel, 1.0, transform=WeightMap(a, b)), t)


def test_maps_on_another_device():
    for transform, words in (
        (torch.zeros(3, 4, device="meta"), "transform is on meta, the source on cpu"),
        (lambda s: s[:3].to("meta"), "the transformed source is on meta, its target on cpu"),
    ):
        target = torch.ones(3)
        for call in (blend, blend_):
            with pytest.raises(ValueError, match=words):
                call(target, torch.ones(4), 0.5, transform=transform)
        assert (target == 1).all()


def test_compiled(backend):
    def step(t, s, w, source):
        return blend(t, s, 0.3, transform=layer), blend(w, source, 0.3, transform=maps)

    layer, maps = ConvMap(3, 4), WeightMap(torch.randn(6, 5), torch.randn(4, 7))
    args = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(6, 7), torch.randn(5, 4)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(found, step(*args))


# --------------------------------------------------------------------------------------------- mapped networks


def mlp(width, depth=2, inputs=5, outputs=3, activation=nn.ReLU):
    layers = [nn.Linear(inputs, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, outputs)).double()


def test_neurons_that_are_copied_compute_the_same(backend):
    """Net2WiderNet, the maps fitted from the features of both sides; halfway between two such networks too."""
    source, target = mlp(8), mlp(12)
    copied = torch.tensor([*range(8), 2, 2, 5, 7])
    x = torch.randn(200, 5, dtype=F64)
    first, second = source[:2](x).detach(), source[:4](x).detach()
    outputs = [
        LinearMap(8, 12, bias=False, dtype=F64).fit(f, f[:, copied]) for f in (source[0](x), source[2](first))
    ]
    inputs = [LinearMap(12, 8, bias=False, dtype=F64).fit(f[:, copied], f) for f in (first, second)]
    maps = {
        "0.*": WeightMap(outputs[0]),
        "2.*": WeightMap(outputs[1], inputs[0]),
        "4.weight": WeightMap(None, inputs[1]),
    }
    blend_(target, source, 0.0, transform=maps)
    held_out = torch.randn(50, 5, dtype=F64)
    torch.testing.assert_close(target(held_out), source(held_out), rtol=1e-8, atol=1e-8)
    again = mlp(12)
    again.load_state_dict(target.state_dict())
    blend_(again, source, 0.5, transform=maps)
    torch.testing.assert_close(again(held_out), source(held_out), rtol=1e-8, atol=1e-8)


def test_another_basis_computes_the_same(backend):
    """A linear network in a rotated basis of more dimensions; B from source to target is its own inverse there."""
    source, target = (mlp(w, activation=nn.Identity) for w in (6, 9))
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=F64)).Q[:, :6]
    middle = WeightMap(basis, basis.T)
    blend_(
        target,
        source,
        0.0,
        transform={"0.*": WeightMap(basis), "2.*": middle, "4.weight": WeightMap(None, basis.T)},
    )
    x = torch.randn(20, 5, dtype=F64)
    torch.testing.assert_close(target(x), source(x), rtol=1e-9, atol=1e-9)


def test_channels_that_are_copied_compute_the_same(backend):
    """Of convolutions, by 1x1 ConvMaps fitted on feature maps."""

    def net(width):
        return nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, stride=2)
        ).double()

    source, target = net(4), net(7)
    copied = torch.tensor([0, 1, 2, 3, 3, 1, 3])
    x = torch.randn(4, 2, 9, 9, dtype=F64)
    outputs, features = source[0](x).detach(), source[:2](x).detach()
    a = ConvMap(4, 7, bias=False, dtype=F64).fit(outputs, outputs[:, copied])
    b = ConvMap(7, 4, bias=False, dtype=F64).fit(features[:, copied], features)
    blend_(target, source, 0.0, transform={"0.*": WeightMap(a), "2.weight": WeightMap(None, b)})
    x = torch.randn(2, 2, 8, 8, dtype=F64)
    torch.testing.assert_close(target(x), source(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: WeightMap(), ValueError, "got None for both"),
        (
            lambda: WeightMap(nn.ReLU()),
            TypeError,
            "outputs must be a LinearMap, a ConvMap, a matrix or None, got ReLU",
        ),
        (lambda: WeightMap(torch.ones(3)), ValueError, "outputs must be a matrix, got shape [3]"),
        (lambda: WeightMap(torch.ones(3, 3).int()), TypeError, "outputs"),
        (lambda: WeightMap(ConvMap(2, 3, 3)), ValueError, "kernel size 1"),
        (lambda: WeightMap(None, LinearMap(3, 2)), ValueError, "inputs must have no bias"),
        (
            lambda: WeightMap(torch.ones(3, 2))(torch.ones(4, 2)),
            ValueError,
            "outputs map 2 of the source to 3",
        ),
        (
            lambda: WeightMap(None, torch.ones(3, 2))(torch.ones(4, 2)),
            ValueError,
            "inputs map 3 of the source to 2",
        ),
        (lambda: WeightMap(torch.ones(3, 2))(torch.ones(())), ValueError, "without dimensions"),
        (
            lambda: blend(torch.ones(5, 2), torch.ones(2, 2), 0.5, transform=WeightMap(torch.ones(3, 2))),
            ValueError,
            "the transformed source has shape [3, 2], its target has [5, 2]",
        ),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=re.escape(words)):
        make()
