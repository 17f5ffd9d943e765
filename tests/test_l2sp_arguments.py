"""What l2sp accepts, how params and start match, each error, and that a call that raises has modified nothing."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from fasttransfer import l2sp_add_grad_, l2sp_penalty, l2sp_prox_
from tests.nets import tied


def ones(*shape, **options):
    return torch.ones(shape, **options)


CALLS = {
    "l2sp_penalty": l2sp_penalty,
    "l2sp_add_grad_": l2sp_add_grad_,
    "l2sp_prox_": lambda params, start, strength: l2sp_prox_(params, start, strength, 1.0),
}


@pytest.fixture(params=CALLS, ids=str)
def call(request):
    return CALLS[request.param]


# ------------------------------------------------------------------------------------------ kinds and matching


def test_kinds_of_collections(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    values = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    expected = l2sp_penalty(list(model.parameters()), list(values.values()), 0.3)
    reordered = dict(reversed(values.items()))
    for params, start in [
        (model, values),
        (model, reordered),
        (dict(model.named_parameters()), reordered),
        (model.parameters(), iter(values.values())),
        (tuple(model.parameters()), values.values()),
    ]:
        assert torch.equal(l2sp_penalty(params, start, 0.3), expected)


def test_start_as_a_module(backend):
    model, start = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = sum((p - q).detach().square().sum() for p, q in zip(model.parameters(), start.parameters()))  # noqa: B905
    torch.testing.assert_close(l2sp_add_grad_(model, start, 1.0), expected)
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in start.parameters())


def test_parameter_list_and_dict(backend):
    for make in (lambda: nn.ParameterList([ones(2), ones(3)]), lambda: nn.ParameterDict({"a": ones(2)})):
        params, start = make(), make()
        with torch.no_grad():
            next(iter(start.parameters())).zero_()
        assert l2sp_penalty(params, start, 1.0).item() == 2


def test_tied_weights_count_once(backend):
    model = tied()
    start = {"0.weight": torch.zeros(4, 3)}
    assert torch.equal(l2sp_penalty(model, start, 1.0), l2sp_penalty(model[0].weight, start["0.weight"], 1.0))
    l2sp_add_grad_(model, start, 1.0)
    torch.testing.assert_close(model[0].weight.grad, 2 * model[0].weight.detach())


def test_tied_weights_against_a_state_dict(backend):
    """Which has both names: two tensors, one memory."""
    model, start = tied(), tied()
    with torch.no_grad():
        start[0].weight.copy_(model[0].weight + 1)
    assert abs(l2sp_penalty(model, start.state_dict(), 1.0).item() - 12) <= 1e-5
    l2sp_prox_(model, start.state_dict(), 1e300, 1e300)
    assert torch.equal(model[0].weight, start[0].weight)


def test_numbers_of_numpy(backend):
    p, p0 = ones(2, requires_grad=True), torch.zeros(2)
    assert l2sp_penalty(p, p0, np.float32(0.5)).item() == 1
    assert l2sp_add_grad_(p, p0, np.int64(1), grad_scale=np.float64(2)).item() == 2
    assert p.grad.tolist() == [4, 4]


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "params, start, kind, words",
    [
        ({"a.b": ones(2, 3)}, {"a.b": ones(3, 2)}, ValueError, ["a.b", "[2, 3]", "[3, 2]"]),
        ({"a": ones(1, 4)}, {"a": ones(4, 4)}, ValueError, ["'a'", "[1, 4]", "[4, 4]"]),
        ({"a": ones()}, {"a": ones(1)}, ValueError, ["'a'", "[]", "[1]"]),
        ([ones(2), ones(3)], [ones(2), ones(4)], ValueError, ["params[1]", "start[1]", "[3]", "[4]"]),
        ([ones(2), ones(2)], [ones(2)], ValueError, ["2", "1", "as many"]),
        ({"a": ones(2), "b": ones(2)}, {"a": ones(2)}, ValueError, ["start", "lacks 'b'"]),
        ({"a": ones(2)}, {"a": ones(2), "b": ones(2)}, ValueError, ["start", "'b'"]),
        ({"w": ones(2)}, {"module.w": ones(2)}, ValueError, ["'w'", "'module.w'"]),
        ([ones(2)], {"a": ones(2)}, TypeError, ["start", "list", "dict"]),
        (ones(2), [ones(2)], TypeError, ["start", "a tensor", "list"]),
        (3.0, ones(2), TypeError, ["params", "float"]),
        ("ab", "ab", TypeError, ["params", "str"]),
        ([1.0], [ones(1)], TypeError, ["params[0]", "float"]),
        ([("a", ones(2))], [ones(2)], TypeError, ["params[0]", "tuple"]),
        ([ones(2)], [None], TypeError, ["start[0]", "NoneType"]),
        ([ones(2).int()], [ones(2)], TypeError, ["params[0]", "int32", "float32"]),
        ({"n": ones(2)}, {"n": ones(2).long()}, TypeError, ["start['n']", "int64"]),
        ([ones(2).cfloat()], [ones(2)], TypeError, ["params[0]", "complex64"]),
        ([ones(2).to_sparse()], [ones(2)], TypeError, ["params[0]", "sparse"]),
        ([ones(2)], [ones(2, device="meta")], ValueError, ["start[0]", "meta", "cpu"]),
        ([], [], ValueError, ["params"]),
        (nn.ReLU(), nn.ReLU(), ValueError, ["params"]),
    ],
)
def test_params_and_start_that_do_not_fit(call, params, start, kind, words):
    with pytest.raises(kind) as caught:
        call(params, start, 1.0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_same_tensor_twice(call):
    p = ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"twice.*'a'.*'b'"):
        call({"a": p, "b": p}, {"a": ones(2), "b": ones(2)}, 1.0)
    assert p.grad is None


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_strength_out_of_range(call, strength):
    with pytest.raises(ValueError, match="strength must be at least 0"):
        call([ones(2)], [ones(2)], strength)


@pytest.mark.parametrize("strength", [None, "0.1", True, torch.tensor(0.1), np.array(0.1)], ids=repr)
def test_strength_that_is_no_number(call, strength):
    with pytest.raises(TypeError, match="strength must be a number"):
        call([ones(2)], [ones(2)], strength)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), "a", None])
def test_lr(lr):
    with pytest.raises((TypeError, ValueError), match="lr must be"):
        l2sp_prox_([ones(2)], [ones(2)], 1.0, lr)


@pytest.mark.parametrize(
    "scale", [-1.0, float("nan"), "a", ones(2), torch.tensor(2), ones(0), torch.tensor(True)], ids=repr
)
def test_grad_scale(scale):
    p = ones(2, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match="grad_scale must be"):
        l2sp_add_grad_([p], [ones(2)], 1.0, grad_scale=scale)
    assert p.grad is None


# ------------------------------------------------------------------------- nothing is modified by a raising call


def state(params):
    return [(p.detach().clone(), p._version, p.grad is None, p.grad) for p in params]


def assert_unmodified(params, before):
    for p, (value, version, no_grad, grad) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert p._version == version
        assert (p.grad is None) == no_grad
        assert p.grad is grad
        assert grad is None or grad.is_sparse or not grad.any()


@pytest.mark.parametrize(
    "bad, kind",
    [(torch.zeros(3).to_sparse(), TypeError), (torch.zeros(1).expand(3), ValueError)],
    ids=["sparse", "expanded"],
)
def test_a_gradient_that_cannot_be_added_to(bad, kind):
    params = [ones(3, requires_grad=True) for _ in range(4)]
    params[0].grad, params[2].grad = torch.zeros(3), bad
    before = state(params)
    with pytest.raises(kind, match=re.escape("params[2]")):
        l2sp_add_grad_(params, [torch.zeros(3)] * 4, 1.0)
    assert_unmodified(params, before)


def test_the_error_names_the_parameter_with_the_bad_gradient():
    """By its name, and by its own position also where tensors before it are frozen."""
    frozen, p, start = ones(3), ones(3, requires_grad=True), torch.zeros(3)
    p.grad = torch.zeros(1).expand(3)
    with pytest.raises(ValueError, match=re.escape("params['layer.weight']")):
        l2sp_add_grad_({"first": frozen, "layer.weight": p}, {"first": start, "layer.weight": start}, 1.0)
    with pytest.raises(ValueError, match=re.escape("params[1]")):
        l2sp_add_grad_([frozen, p], [start, start], 1.0)


def test_prox_of_an_expanded_parameter():
    good, bad = ones(3, requires_grad=True), ones(1).expand(3).requires_grad_()
    before = state([good, bad])
    with pytest.raises(ValueError, match=r"params\[1\].*overlap"):
        l2sp_prox_([good, bad], [torch.zeros(3)] * 2, 1.0, 1.0)
    assert_unmodified([good, bad], before)


def test_a_mismatch_in_the_last_pair(call):
    params = [ones(3, requires_grad=True) for _ in range(3)]
    params[0].grad = torch.zeros(3)
    before = state(params)
    with pytest.raises(ValueError, match="shape"):
        call(params, [torch.zeros(3), torch.zeros(3), torch.zeros(4)], 1.0)
    assert_unmodified(params, before)


def test_a_tensor_that_is_no_leaf():
    """Its gradient would be written to a temporary and lost."""
    w = ones(3, requires_grad=True)
    with pytest.raises((TypeError, ValueError), match=re.escape("params[0]")):
        l2sp_add_grad_([w * 2], [torch.zeros(3)], 1.0)


@pytest.mark.parametrize(
    "views", [lambda m: [m[:5], m[3:]], lambda m: [m, m.view(8)]], ids=["shifted", "same"]
)
def test_prox_of_parameters_that_share_memory(views):
    """Would be pulled twice, by two threads."""
    memory = torch.ones(8)
    params = [v.detach().requires_grad_() for v in views(memory)]
    with pytest.raises(ValueError, match="memory"):
        l2sp_prox_(params, [torch.zeros_like(p) for p in params], 1.0, 0.5)
    assert torch.equal(memory, torch.ones(8))


def test_the_usual_list_is_refused_whole(backend):
    """The way past the general checks: what is wrong with the last pair leaves the first gradient as it was."""
    for wrong in (
        torch.ones(3),
        torch.ones(2).int(),
        torch.ones(2, 1),
        torch.ones(2).to_sparse(),
        "no tensor",
    ):
        params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
        for p in params:
            p.grad = torch.ones(2)
        with pytest.raises((ValueError, TypeError)):
            l2sp_add_grad_(params, [torch.zeros(2), wrong], 0.5)
        assert all(p.grad.tolist() == [1, 1] for p in params)


def test_a_sparse_gradient_in_the_usual_list(backend):
    params = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    params[0].grad, params[1].grad = torch.ones(2), torch.ones(2).to_sparse()
    with pytest.raises(TypeError, match="dense"):
        l2sp_add_grad_(params, [torch.zeros(2)] * 2, 0.5)
    assert params[0].grad.tolist() == [1, 1]


def test_gradients_that_overlap_are_refused(backend):
    flat = torch.zeros(12)
    params = [torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(8))]
    params[0].grad, params[1].grad = flat[:8], flat[4:]
    with pytest.raises(ValueError, match=r"the gradient of params\[0\].*overlap"):
        l2sp_add_grad_(params, [torch.zeros(8)] * 2, 0.1)
    assert not flat.any()
    params[1].grad = torch.zeros(1).expand(8)
    with pytest.raises(ValueError, match=r"the gradient of params\[1\].*overlap"):
        l2sp_add_grad_(params, [torch.zeros(8)] * 2, 0.1)
    assert not flat.any()
