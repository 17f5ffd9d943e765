"""l2sp and autograd: derivatives, what is attached to a graph, and version counters."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fasttransfer import L2SP, l2sp_add_grad_, l2sp_penalty, l2sp_prox_

INPLACE = "modified by an inplace operation"


@pytest.fixture
def lists():
    """Parameters that require grad and start points, fp32."""
    shapes = (7,), (2, 3), (), (0, 2)
    return [torch.randn(shape, requires_grad=True) for shape in shapes], [torch.randn(s) for s in shapes]


# ------------------------------------------------------------------------------------------------ derivatives


def test_gradcheck(backend):
    starts = [torch.randn(5).double(), torch.randn(2, 3).double()]
    params = [torch.randn_like(p0).requires_grad_() for p0 in starts]

    def penalty(*params):
        return l2sp_penalty(params, starts, 0.7)

    assert gradcheck(penalty, params)
    assert gradgradcheck(penalty, params)


def test_gradgradcheck_through_a_function_of_the_penalty(backend):
    starts = [torch.randn(4).double()]
    assert gradgradcheck(
        lambda p: l2sp_penalty([p.sin()], starts, 0.7).exp(), torch.randn(4).double().requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_at_the_start_is_zero(backend, dtype):
    """Not NaN, as that of a norm is."""
    p0 = torch.randn(33).to(dtype)
    p = p0.clone().requires_grad_()
    value = l2sp_penalty([p], [p0], 3.0)
    value.backward()
    assert value.item() == 0
    assert torch.equal(p.grad, torch.zeros_like(p))
    p.grad = None
    assert l2sp_add_grad_([p], [p0], 3.0).item() == 0
    assert torch.equal(p.grad, torch.zeros_like(p))


def test_upstream_scales_the_gradient(backend, lists):
    params, starts = lists
    once = torch.autograd.grad(l2sp_penalty(params, starts, 0.5), params)
    scaled = torch.autograd.grad(0.25 * l2sp_penalty(params, starts, 0.5) * 8, params)
    for g, g2 in zip(once, scaled, strict=True):
        assert torch.equal(2 * g, g2)


def test_a_loss_scale_is_applied_before_rounding_to_fp16(backend):
    p = torch.full((8,), 2.0**-10, dtype=torch.float16, requires_grad=True)
    (2.0**16 * l2sp_penalty([p], [torch.zeros(8)], 2.0**-17)).backward()
    assert p.grad.tolist() == [2.0**-10] * 8


def test_second_backward_with_retain_graph(backend, lists):
    params, starts = lists
    value = l2sp_penalty(params, starts, 0.5)
    first = torch.autograd.grad(value, params, retain_graph=True)
    second = torch.autograd.grad(value, params)
    assert all(torch.equal(g, g2) for g, g2 in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_checkpoint(backend, lists):
    params, starts = lists
    expected = torch.autograd.grad(l2sp_penalty(params, starts, 0.5), params)
    value = checkpoint(lambda *p: l2sp_penalty(p, starts, 0.5), *params, use_reentrant=False)
    assert all(torch.equal(g, g2) for g, g2 in zip(expected, torch.autograd.grad(value, params), strict=True))


def test_gradients_accumulate(backend, lists):
    params, starts = lists
    task = [torch.randn_like(p) for p in params]
    for p, g in zip(params, task, strict=True):
        p.grad = g.clone()
    l2sp_penalty(params, starts, 0.5).backward()
    for p, p0, g in zip(params, starts, task, strict=True):
        torch.testing.assert_close(p.grad, g + (p.detach() - p0))


# --------------------------------------------------------------------------------------------- what is attached


def test_only_parameters_that_require_grad_are_attached(backend):
    a, b, s = torch.randn(3, requires_grad=True), torch.randn(3), torch.zeros(3)
    value = l2sp_penalty([a, b], [s, s], 1.0)
    torch.testing.assert_close(value, a.square().sum() + b.square().sum())
    value.backward()
    torch.testing.assert_close(a.grad, 2 * a.detach())
    assert b.grad is None
    assert not l2sp_penalty([b], [s], 1.0).requires_grad
    with torch.no_grad():
        assert not l2sp_penalty([a], [s], 1.0).requires_grad


def test_start_points_are_constants(backend):
    p, p0 = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    l2sp_penalty([p], [p0], 1.0).backward()
    assert p0.grad is None
    l2sp_add_grad_([p], [p0], 1.0)
    l2sp_prox_([p], [p0], 1.0, 1.0)
    assert p0.grad is None


def test_add_grad_and_prox_leave_no_graph(backend, lists):
    params, starts = lists
    assert not l2sp_add_grad_(params, starts, 1.0).requires_grad
    l2sp_prox_(params, starts, 1.0, 1.0)
    assert all(p.is_leaf and p.requires_grad and not p.grad.requires_grad for p in params)


def test_forward_mode_is_refused_and_not_dropped(backend):
    """A tangent that is lost without a word would be a derivative of 0."""
    p, p0 = torch.randn(3), torch.zeros(3)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        l2sp_penalty([forward_ad.make_dual(p, torch.ones(3))], [p0], 1.0)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda q: l2sp_penalty([q], [p0], 1.0))(p)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda q: l2sp_penalty([q], [p0], 1.0))(torch.randn(2, 3))


def test_frozen_parameters_get_no_gradient_and_do_not_move(backend):
    frozen, trained, s = torch.randn(3), torch.randn(3, requires_grad=True), torch.zeros(3)
    before, version = frozen.clone(), frozen._version
    value = l2sp_add_grad_([frozen, trained], [s, s], 1.0)
    torch.testing.assert_close(value, trained.detach().square().sum())
    l2sp_prox_([frozen, trained], [s, s], 1.0, 0.5)
    assert frozen.grad is None
    assert frozen._version == version
    assert torch.equal(frozen, before)


def test_everything_frozen(backend):
    frozen, s = torch.randn(3), torch.zeros(3)
    assert l2sp_add_grad_([frozen], [s], 1.0).item() == 0
    l2sp_prox_([frozen], [s], 1.0, 1.0)
    assert frozen.grad is None


def test_inference_mode(backend):
    with torch.inference_mode():
        p, p0 = torch.full((3,), 2.0), torch.zeros(3)
        assert l2sp_penalty([p], [p0], 1.0).item() == 12


# -------------------------------------------------------------------------------------------- version counters


def test_prox_of_a_weight_saved_for_backward(backend):
    w = torch.randn(3, requires_grad=True)
    out = (w * w).sum()
    l2sp_prox_([w], [torch.zeros(3)], 1.0, 1.0)
    with pytest.raises(RuntimeError, match=INPLACE):
        out.backward()


def test_add_grad_to_a_gradient_saved_for_backward(backend):
    p, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    p.grad = torch.randn(3)
    out = (x * p.grad).sum()
    l2sp_add_grad_([p], [torch.zeros(3)], 1.0)
    with pytest.raises(RuntimeError, match=INPLACE):
        out.backward()


def test_a_parameter_changed_between_penalty_and_backward(backend):
    p = torch.randn(3, requires_grad=True)
    value = l2sp_penalty([p], [torch.zeros(3)], 1.0)
    l2sp_prox_([p], [torch.zeros(3)], 1.0, 1.0)
    with pytest.raises(RuntimeError, match=INPLACE):
        value.backward()


def test_only_what_is_written_is_counted(backend):
    p, p0 = torch.randn(3, requires_grad=True), torch.randn(3)
    p.grad = torch.zeros(3)
    l2sp_add_grad_([p], [p0], 1.0)
    assert (p._version, p0._version) == (0, 0)
    assert p.grad._version > 0
    l2sp_prox_([p], [p0], 1.0, 1.0)
    assert p._version > 0
    assert p0._version == 0


# ------------------------------------------------------------------------------------------- torch's own checks


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("scale", [None, torch.tensor(2.0)], ids=["number", "tensor"])
def test_opcheck_add_grad(one_backend, accumulate, scale):
    params = [torch.randn(3), torch.randn(2, 2)]
    grads = [torch.randn(3), torch.randn(2, 2)]
    args = (
        params,
        [torch.randn(3), None],
        grads,
        [0.1, 0.2],
        [torch.rand(3), None],
        [accumulate] * 2,
        1.0,
        scale,
    )
    opcheck(torch.ops.fasttransfer.l2sp_add_grad_.default, args)


def test_opcheck_value_and_gradient(one_backend):
    args = (
        [torch.randn(3), torch.randn(2, 2)],
        [torch.randn(3).double(), None],
        [0.1, 0.2],
        [torch.rand(3), None],
    )
    opcheck(torch.ops.fasttransfer.l2sp_value.default, args)
    opcheck(torch.ops.fasttransfer.l2sp_grad.default, (*args, torch.tensor(0.5)))


def test_opcheck_of_pure_torch():
    from fasttransfer import use_backend

    with use_backend("reference"):
        args = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), None], [0.1, 0.2], []
        opcheck(torch.ops.fasttransfer.l2sp_value.default, args)
        opcheck(torch.ops.fasttransfer.l2sp_grad.default, (*args, torch.tensor(0.5)))


@pytest.mark.parametrize("device", ["meta"])
def test_a_device_without_kernels_runs_pure_torch(device):
    p = torch.ones(3, device=device, requires_grad=True)
    p0 = torch.ones(3, device=device)
    value = l2sp_penalty([p], [p0], 1.0)
    value.backward()
    l2sp_add_grad_([p], [p0], 1.0)
    l2sp_prox_([p], [p0], 1.0, 1.0)
    assert (value.device.type, p.grad.device.type) == (device, device)


def test_the_autocast_dtype_does_not_enter(one_backend):
    model = torch.nn.Linear(3, 2)
    reg = L2SP(model, 1.0, start={"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    expected = reg()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reg(), expected)
