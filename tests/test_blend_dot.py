"""blend_dot, the gradient of a coefficient: sums of products against float64, and learnable alphas through it."""

import pytest
import torch
from torch.library import opcheck

from fasttransfer import blend, blend_many, use_backend
from fasttransfer.ops.blend import blend_dot_op

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(), (0, 3), (1,), (33,), (7, 11), (3, 16384), (2, 3, 5, 4)]


def exact(upstream, terms, coefs):
    """The dot products in float64, and the sums of what they add up by size."""
    k, dots, sizes = len(coefs), [], []
    for i, g in enumerate(upstream):
        parts = [c * t.double() for c, t in zip(coefs, terms[i * k : (i + 1) * k], strict=True) if c]
        dots.append((g.double() * sum(parts)).sum())
        sizes.append((g.double().abs() * sum(p.abs() for p in parts)).sum())
    return torch.stack(dots), torch.stack(sizes)


@pytest.mark.parametrize(
    "dtypes, coefs",
    [
        ((F32, F32, F32), [1.0, -1.0]),
        ((BF16, BF16, BF16), [1.0, -1.0]),
        ((F16, F16, F16), [1.0, -1.0]),
        ((F64, F64, F64), [1.0, -1.0]),
        ((BF16, F32, F16), [1.0, -1.0]),
        ((F32, F64, F32), [1.0, -1.0]),
        (
            (F32,) * 7,
            [1.0, -0.5, 0.0, -0.25, 0.25, -0.5],
        ),  # in more groups than one; a source that counts nothing
        ((F32, F16), [1.0]),
        ((F32, F32, F32), [0.75, 0.5]),
    ],
    ids=["fp32", "bf16", "fp16", "fp64", "mixed16", "mixed64", "soup", "one", "sum"],
)
def test_against_float64(backend, dtypes, coefs):
    upstream = [torch.randn(s).to(dtypes[0]) for s in SHAPES]
    terms = [torch.randn(s).to(d) for s in SHAPES for d in dtypes[1:]]
    for t, c in zip(terms, coefs * len(SHAPES), strict=True):
        if c == 0:
            t.fill_(torch.nan)
    dots, sizes = exact(upstream, terms, coefs)
    found = blend_dot_op(upstream, terms, coefs)
    assert (found.shape, found.dtype) == ((len(SHAPES),), F64)
    bound = 1e-14 if F64 in dtypes else 2e-7
    assert ((found - dots).abs() <= bound * sizes).all()


def test_of_close_operands(backend):
    """Fine-tuned weights differ from their source by little; the difference is exact before it is multiplied."""
    source = torch.randn(50_000)
    target = source + 1e-4 * torch.randn(50_000)
    upstream = torch.randn(50_000)
    each = upstream.double() * (target.double() - source.double())
    found = blend_dot_op([upstream], [target, source], [1.0, -1.0])
    assert (found[0] - each.sum()).abs() <= 1e-7 * each.abs().sum()


def test_layouts(backend):
    """Read through their strides where these agree, from copies where they do not; an upstream of a sum is expanded."""
    t, s = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    last = torch.channels_last
    for g, x, y in (
        (torch.randn(2, 5, 3, 4).to(memory_format=last), t.to(memory_format=last), s.to(memory_format=last)),
        (torch.ones(()).expand(2, 5, 3, 4), t, s.to(memory_format=last)),
        (torch.randn(5, 2, 3, 4).transpose(0, 1), t, s),
        (torch.randn(121)[1:].view(2, 5, 3, 4), t, s),
    ):
        dots, sizes = exact([g], [x, y], [1.0, -1.0])
        assert ((blend_dot_op([g], [x, y], [1.0, -1.0]) - dots).abs() <= 2e-7 * sizes).all()


def test_the_same_bits_for_any_number_of_threads(backend):
    upstream, terms = [torch.randn(300_001), torch.randn(5)], [torch.randn(300_001), torch.randn(5)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(blend_dot_op(upstream, terms, [1.0]))
    finally:
        torch.set_num_threads(before)
    if backend != "reference":  # whose sums are torch's
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("scaled", [False, True], ids=["complementary", "scaled"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_alpha_per_layer(backend, dtype, scaled):
    """The gradient of each layer's alpha; of one whose output is not used it is 0."""
    shapes = {"a": (40, 30), "b": (7,), "unused": (3,)}
    target, one, two = ({n: torch.randn(s).to(dtype) for n, s in shapes.items()} for _ in range(3))
    alpha = {n: torch.tensor(v, requires_grad=True) for n, v in zip(shapes, (0.3, 0.8, 0.5), strict=True)}
    scale = torch.tensor(0.4, requires_grad=True) if scaled else None
    weights = [0.75, 0.25] if not scaled else [0.5, -0.25]
    out = blend_many(target, [one, two], alpha, weights=weights, source_scale=scale)
    upstream = {n: torch.randn(shapes[n]).to(dtype) for n in ("a", "b")}
    torch.autograd.backward([out[n] for n in upstream], list(upstream.values()))
    on_scale = on_scale_size = 0
    for n, g in upstream.items():
        source = weights[0] * one[n].double() + weights[1] * two[n].double()
        wanted = g.double() * (target[n].double() - (0 if scaled else source))
        error = (alpha[n].grad.double() - wanted.sum()).abs()
        assert error <= 1e-6 * (g.double().abs() * (target[n].double().abs() + source.abs())).sum()
        on_scale += (g.double() * source).sum()
        on_scale_size += (g.double() * source).abs().sum()
    assert alpha["unused"].grad is not None
    assert alpha["unused"].grad == 0
    if scaled:
        assert (scale.grad.double() - on_scale).abs() <= 1e-6 * on_scale_size


def test_a_source_without_weight_is_not_looked_at(backend):
    alpha = torch.tensor(0.5, requires_grad=True)
    nan = torch.full((3,), torch.nan)
    t, s = torch.randn(3), torch.randn(3)
    blend_many(t, [s, nan], alpha, weights=[1.0, 0.0]).sum().backward()
    torch.testing.assert_close(alpha.grad, (t - s).sum())


def test_twice(backend):
    """Under create_graph the gradient of alpha has gradients of its own: in the upstream and in the operands."""
    t, s = (torch.randn(4, dtype=F64, requires_grad=True) for _ in range(2))
    alpha = torch.tensor([0.3], dtype=F64, requires_grad=True)

    def gradient(t, s, alpha):
        return torch.autograd.grad(blend(t, s, alpha).square().sum(), alpha, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, (t, s, alpha))


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_opcheck_and_compile(one_backend, kernels):
    if kernels == "native" and one_backend == "reference":
        pytest.skip("no native CPU kernels")
    terms = [torch.randn(3), torch.randn(3).double(), torch.randn(2, 4), torch.randn(4, 2).t().bfloat16()]
    with use_backend("auto" if kernels == "native" else "reference"):
        opcheck(blend_dot_op, ([torch.randn(3), torch.randn(2, 4)], terms, [1.0, -1.0]))

        def loss(target, source, alpha):
            return blend(target, source, {"a": alpha, "*": 0.5})["a"].square().sum()

        target, source = ({"a": torch.randn(5), "b": torch.randn(2)} for _ in range(2))
        alpha = torch.tensor(0.3, requires_grad=True)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, expected = (torch.autograd.grad(f(target, source, alpha), alpha)[0] for f in (compiled, loss))
        torch.testing.assert_close(found, expected)
