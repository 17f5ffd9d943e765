"""blend and autograd: derivatives in every operand, what is attached to a graph, version counters."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from fasttransfer import blend, blend_, blend_many, blend_many_, use_backend

INPLACE = "modified by an inplace operation"


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


# ------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 0.0])
def test_in_target_and_source(backend, check, alpha):
    assert check(lambda t, s: blend(t, s, alpha), (leaf(2, 3), leaf(2, 3)))
    assert check(lambda t, s: blend(t, s, alpha, source_scale=-0.7), (leaf(3), leaf(3)))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_in_alpha_and_source_scale(backend, check, shape):
    """Alpha on both sides of 1/2, where the formula changes its base."""
    for value in (0.3, 0.8):
        alpha, scale = (torch.full(shape, value, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert check(blend, (leaf(5), leaf(5), alpha))
        assert check(lambda t, s, a, b: blend(t, s, a, source_scale=b), (leaf(5), leaf(5), alpha, scale))
        assert check(lambda t, s, b: blend(t, s, 0.4, source_scale=b), (leaf(5), leaf(5), scale))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_in_a_transform(backend, check):
    def through_matrix(t, s, matrix, alpha):
        return blend(t, s, alpha, transform=matrix)

    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert check(through_matrix, (leaf(2, 3), leaf(2, 4), leaf(3, 4), alpha))

    conv = nn.Conv1d(2, 3, 1).double()

    def through_module(t, s, weight):
        return blend(
            t, s, 0.4, transform=lambda x: torch.func.functional_call(conv, {"weight": weight}, (x,))
        )

    assert check(through_module, (leaf(3, 5), leaf(2, 5), leaf(3, 2, 1)))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_in_several_sources(backend, check):
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def soup(t, a, b, c, alpha):
        return blend_many(t, [a, b, c], alpha, weights=[0.5, -0.25, 0.75])

    assert check(soup, (leaf(4), leaf(4), leaf(4), leaf(4), alpha))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_in_one_of_a_list_by_name(backend, check):
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def by_name(a, b, alpha):
        out = blend({"a": a, "b": b}, {"a": b, "b": a}, {"a": alpha, "*": 0.9})
        return out["a"], out["b"]

    assert check(by_name, (leaf(4), leaf(4), alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_in_other_dtypes(backend, dtype, source_dtype):
    t, s = leaf(50, dtype=dtype), leaf(50, dtype=source_dtype)
    alpha = torch.tensor(0.3, requires_grad=True)
    out = blend(t, s, alpha)
    upstream = torch.randn(50).to(dtype)
    out.backward(upstream)
    assert (t.grad.dtype, s.grad.dtype, alpha.grad.dtype) == (dtype, source_dtype, torch.float32)
    up, a = upstream.double(), alpha.double().item()
    torch.testing.assert_close(t.grad.double(), up * a, rtol=2.0**-7, atol=0)
    torch.testing.assert_close(s.grad.double(), up * (1 - a), rtol=2.0**-7, atol=0)
    exact = (up * (t.detach().double() - s.detach().double())).sum()
    torch.testing.assert_close(alpha.grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_learnable_alpha_finds_its_minimum(backend):
    """S7: alpha per layer, on held-out data; here the data say 0.25 and 0.75."""
    target, source = (
        {"a": torch.randn(50), "b": torch.randn(50)},
        {"a": torch.randn(50), "b": torch.randn(50)},
    )
    wanted = {name: blend(target[name], source[name], w) for name, w in (("a", 0.25), ("b", 0.75))}
    alpha = nn.ParameterDict({"a": torch.tensor(0.5), "b": torch.tensor(0.5)})
    optimizer = torch.optim.SGD(alpha.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        out = blend(target, source, dict(alpha))
        sum((out[name] - wanted[name]).square().mean() for name in out).backward()
        optimizer.step()
    assert abs(alpha["a"].item() - 0.25) < 1e-3
    assert abs(alpha["b"].item() - 0.75) < 1e-3


def test_only_some_outputs_are_used(backend):
    t, s = [leaf(3), leaf(3)], [leaf(3), leaf(3)]
    alpha = torch.tensor(0.25, requires_grad=True)
    blend(t, s, alpha)[1].sum().backward()
    assert torch.equal(t[1].grad, torch.full((3,), 0.25).double())
    torch.testing.assert_close(alpha.grad.double(), (t[1] - s[1]).sum().detach())
    assert t[0].grad is None
    assert s[0].grad is None


def test_second_backward_with_retain_graph(backend):
    t, s = leaf(3), leaf(3)
    out = blend(t, s, torch.tensor(0.3, requires_grad=True)).sum()
    first = torch.autograd.grad(out, (t, s), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, (t, s)), strict=True))


# ------------------------------------------------------------------------------------------ what is attached


def test_no_graph_without_need(backend):
    t, s = leaf(3), torch.randn(3)
    with torch.no_grad():
        assert not blend(t, s, 0.5).requires_grad
    assert not blend(t.detach(), s, 0.5).requires_grad
    for operands in ((t, s, 0.5), (s, t, 0.5), (s, s, torch.tensor(0.5, requires_grad=True))):
        assert blend(*operands).requires_grad


def test_in_place_forms_leave_no_graph(backend):
    """On leaves that require grad, with gradients on, and from operands that require grad."""
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    alpha = torch.tensor(0.5, requires_grad=True)
    expected = blend(target, source, 0.5)["weight"].detach()
    assert blend_(target, source, alpha) is target
    assert torch.equal(target.weight, expected)
    assert target.weight.is_leaf
    assert target.weight.requires_grad
    matrix = torch.eye(3, requires_grad=True)
    blend_many_(target, [source, source], alpha)
    blend_(target.weight, source.weight, alpha, source_scale=alpha, transform=matrix)
    assert target.weight.grad_fn is None


def test_inference_mode(backend):
    normal = torch.zeros(3)
    with torch.inference_mode():
        t, s = torch.ones(3), torch.zeros(3)
        assert blend(t, s, 0.25).tolist() == [0.25] * 3
        assert blend_(t, normal, 0.5).tolist() == [0.5] * 3
        blend_([t, normal], [s, torch.ones(3)], 0.5)
        assert (t.tolist(), normal.tolist()) == ([0.25] * 3, [0.5] * 3)
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)inference"):
        blend_(t, torch.zeros(3), 0.5)
    assert t.tolist() == [0.25] * 3
    assert blend(t, torch.zeros(3), 0.5).tolist() == [0.125] * 3


def test_transforms_that_drop_derivatives_are_refused(backend):
    """A tangent or a batch dimension that is lost without a word would be a wrong number."""
    t, s = torch.randn(3), torch.randn(3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        blend(forward_ad.make_dual(t, torch.ones(3)), s, 0.5)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: blend(x, s, 0.5).sum())(t)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda x: blend(x, s, 0.5))(torch.randn(2, 3))


# -------------------------------------------------------------------------------------------- version counters


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda w: blend_(w, torch.zeros(3), 0.5),
        lambda w: blend_([torch.zeros(2), w], [torch.ones(2), torch.zeros(3)], 0.5),
        lambda w: blend_({"w": w}, {"w": torch.zeros(3)}, torch.tensor(0.5)),
        lambda w: blend_many_(w, [torch.zeros(3)] * 2, 0.5),
        lambda w: blend_(w, torch.zeros(3), 0.5, source_scale=2.0),
    ],
    ids=["tensor", "list", "dict", "many", "scale"],
)
def test_a_weight_saved_for_backward_and_then_overwritten(backend, overwrite):
    x, w = torch.randn(3, requires_grad=True), torch.randn(3)
    out = (x * w).sum()
    overwrite(w)
    with pytest.raises(RuntimeError, match=INPLACE):
        out.backward()


def test_a_layer_overwritten_between_forward_and_backward(backend):
    layer, other = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    loss = layer(x).sum()
    blend_(layer, other, 0.999)
    with pytest.raises(RuntimeError, match=INPLACE):
        loss.backward()


def test_operands_changed_between_blend_and_backward(backend):
    """They are needed for the gradient of alpha, and for no other."""
    t, s = torch.randn(3), torch.randn(3)
    out = blend(t, s, torch.tensor(0.5, requires_grad=True)).sum()
    blend_(t, s, 0.5)
    with pytest.raises(RuntimeError, match=INPLACE):
        out.backward()
    x = torch.randn(3, requires_grad=True)
    out = blend(x, s, 0.5).sum()
    blend_(s, t, 0.5)
    out.backward()
    assert x.grad.tolist() == [0.5] * 3


def test_only_what_is_written_is_counted(backend):
    t, s = torch.randn(3), torch.randn(3)
    blend(t, s, 0.5)
    assert (t._version, s._version) == (0, 0)
    blend_(t, s, 0.5)
    assert t._version > 0
    assert s._version == 0


# ------------------------------------------------------------------------------------------- torch's own checks


@pytest.mark.parametrize("op", ["blend", "blend_"])
@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize(
    "alpha, scale",
    [
        (([0.3, 1.0], None), ([], None)),
        (([0.3, 0.0], None), ([0.5, 1.0], None)),
        (([], torch.tensor([0.3, 0.9])), ([], None)),
        (([], torch.tensor([0.3, 0.9])), ([], torch.tensor([0.3, 0.9]).double())),
    ],
    ids=["numbers", "scaled", "tensor", "tensors"],
)
def test_opcheck(one_backend, op, kernels, alpha, scale):
    if kernels == "native" and one_backend == "reference":
        pytest.skip("no native CPU kernels")
    targets = [torch.randn(3), torch.randn(4, 2).t().bfloat16()]
    sources = [torch.randn(3), torch.randn(3).double(), torch.randn(2, 4), torch.randn(2, 4)]
    with use_backend("auto" if kernels == "native" else "reference"):
        operator = getattr(torch.ops.fasttransfer, op).default
        opcheck(operator, (targets, sources, *alpha, *scale, [0.25, 0.75]))
