"""Plain lists, which l2sp_add_grad_ serves in one call past the general checks."""

import pytest
import torch

from fasttransfer import l2sp_add_grad_
from fasttransfer.ops.l2sp import l2sp_add_grad_plain_op
from tests.layouts import LAYOUTS, lay_out, surroundings_intact

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3}


def parameters(count, size=3, value=1.0):
    params = [torch.full((size,), value, requires_grad=True) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(size)
    return params


@pytest.mark.parametrize("start_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype, start_dtype):
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in [(3,), (2, 5), (), (300,)]]
    start = [torch.randn(p.shape).to(start_dtype) for p in params]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    d = [p.detach().double() - p0.double() for p, p0 in zip(params, start, strict=True)]
    expected = [p.grad.double() + 2 * 0.25 * 2.0 * x for p, x in zip(params, d, strict=True)]
    value = l2sp_add_grad_(params, tuple(start), 0.25, grad_scale=2.0)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not value.requires_grad
    torch.testing.assert_close(value.double(), 0.25 * sum(x.square().sum() for x in d), rtol=1e-6, atol=0)
    for p, e in zip(params, expected, strict=True):
        assert (p.grad.double() - e).abs().le(DTYPES[dtype] * (2 + e.abs())).all()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, grad_layout):
    values = [torch.randn(2, 5, 3, 4) for _ in range(3)]
    params = [lay_out(v, layout).detach().requires_grad_() for v in values]
    for p in params:
        p.grad = lay_out(torch.ones(2, 5, 3, 4), grad_layout)
    l2sp_add_grad_(params, [torch.zeros(2, 5, 3, 4) for _ in values], 0.5)
    for p, v in zip(params, values, strict=True):
        torch.testing.assert_close(p.grad, (1 + v), rtol=1e-6, atol=1e-6)
        assert surroundings_intact(p.grad)


def test_a_parameter_twice_among_others(backend):
    for size in (3, 0):
        params = parameters(20, size)
        params.insert(11, params[4])
        with pytest.raises(ValueError, match="twice"):
            l2sp_add_grad_(params, [torch.zeros(size) for _ in params], 0.5)
        assert all(p.grad.tolist() == [1] * size for p in params)


def test_an_empty_parameter_among_others(backend):
    params = [*parameters(2), *parameters(2, 0)]
    assert l2sp_add_grad_(params, [torch.zeros_like(p) for p in params], 0.5).item() == 3.0
    assert params[1].grad.tolist() == [2] * 3


def test_some_are_frozen_or_without_gradient(backend):
    params = parameters(4)
    params[1].requires_grad_(False)
    params[2].grad = None
    assert l2sp_add_grad_(params, [torch.zeros(3)] * 4, 0.5).item() == 4.5
    assert [p.grad.tolist() for p in params] == [[2] * 3, [1] * 3, [1] * 3, [2] * 3]


def test_a_refused_list_is_not_counted(backend):
    params = parameters(2)
    for wrong in (torch.zeros(2), torch.zeros(3).int(), torch.zeros(3).to_sparse()):
        with pytest.raises((TypeError, ValueError)):
            l2sp_add_grad_(params, [torch.zeros(3), wrong], 0.5)
    retained = params[1] * 2
    retained.retain_grad()
    retained.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="leaf"):
        l2sp_add_grad_([params[0], retained], [torch.zeros(3)] * 2, 0.5)
    assert params[0].grad.tolist() == [1] * 3
    assert params[0].grad._version == 0


def test_only_gradients_are_counted(backend):
    params, start = parameters(2), [torch.zeros(3), torch.zeros(3)]
    versions = [p._version for p in params]
    l2sp_add_grad_(params, start, 0.5)
    assert all(p.grad._version > 0 for p in params)
    assert [t._version for t in (*params, *start)] == [*versions, 0, 0]


def test_the_operator_refuses_without_a_word(one_backend):
    def refused(params, start, grads):
        assert l2sp_add_grad_plain_op(params, start, grads, 0.5, 1.0) is None
        assert all((g == 1).all() for g in grads)

    p, g = torch.zeros(2), torch.ones(2)
    refused([p], [torch.zeros(3)], [g])
    refused([p], [p], [torch.ones(3)])
    refused([p], [p, p], [g])
    refused([p], [p], [g.int()])
    refused([p, p], [p, p], [g, g])
    refused([p], [p], [torch.ones(1).expand(2)])


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype(backend):
    """A first one is written in the dtype that the parameter asks for, as backward does, and rounded to that only."""
    p, start = torch.randn(5).bfloat16().requires_grad_(), torch.randn(5)
    p.grad_dtype = torch.float32
    for times in (1, 2):
        l2sp_add_grad_([p], [start], 0.3)
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, times * 0.6 * (p.detach().float() - start))
