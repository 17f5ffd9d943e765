"""l2sp_penalty, l2sp_add_grad_ and l2sp_prox_: their numbers, against float64, in any dtype, size and layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttransfer import l2sp_add_grad_, l2sp_penalty, l2sp_prox_
from tests import oracle
from tests.layouts import LAYOUTS, lay_out, surroundings_intact

# Around a vector of 16 lanes, a block of 1024 and a chunk of 16384 elements of the native kernels, and several chunks.
SIZES = (0, 1, 2, 15, 16, 17, 1023, 1024, 1025, 16383, 16384, 16385, 100_000)
PAIRS = list(itertools.product(oracle.DTYPES, repeat=2))
STRENGTH = 0.37


def pair(size, dtype, start_dtype=None):
    """A parameter as fine-tuning has it, near its start point."""
    p0 = torch.randn(size, dtype=torch.float64)
    p = p0 + 0.1 * torch.randn(size, dtype=torch.float64)
    return p.to(dtype).requires_grad_(), p0.to(start_dtype or dtype)


def check(params, starts, strength=STRENGTH, grad_scale=1.0):
    """Both forms against the oracle; the gradients of the params are added to and left there."""
    exact = oracle.l2sp(params, starts, strength)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32

    value = l2sp_penalty(params, starts, strength)
    assert (value.shape, value.dtype) == ((), dtype)
    # A sum is as exact as its least exact part.
    exactly = all(torch.float64 in (p.dtype, p0.dtype) for p, p0 in zip(params, starts, strict=True))
    oracle.assert_norm_close(value, exact, dtype if exactly else torch.float32)
    for p, p0, g in zip(params, starts, torch.autograd.grad(value, params), strict=True):
        assert g.dtype == p.dtype
        oracle.assert_one_rounding(g, *oracle.l2sp_grad(p, p0, 2 * strength, None))
    with torch.no_grad():
        assert torch.equal(l2sp_penalty(params, starts, strength), value)

    before = [None if p.grad is None else p.grad.clone() for p in params]
    same = [p.grad for p in params]
    added = l2sp_add_grad_(params, starts, strength, grad_scale=None if grad_scale == 1.0 else grad_scale)
    assert torch.equal(added, value)
    assert not added.requires_grad
    for p, p0, g, old in zip(params, starts, same, before, strict=True):
        oracle.assert_one_rounding(p.grad, *oracle.l2sp_grad(p, p0, 2 * strength * grad_scale, old))
        assert g is None or p.grad is g
        assert p.grad.dtype == p.dtype


# ------------------------------------------------------------------------------------------ dtypes and sizes


@pytest.mark.parametrize("dtype, start_dtype", PAIRS, ids=str)
def test_every_size_alone(backend, dtype, start_dtype):
    for size in SIZES:
        p, p0 = pair(size, dtype, start_dtype)
        check([p], [p0])  # p.grad is None: written
        check([p], [p0], grad_scale=3.0)  # added to


def test_all_sizes_and_dtypes_as_one_list(backend):
    """Chunks are cut through the whole list, so that they begin and end anywhere in a tensor."""
    pairs = [pair(size, *dtypes) for dtypes in PAIRS for size in SIZES]
    check(*map(list, zip(*pairs, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_small_tensors(backend, dtype):
    pairs = [pair(1 + i % 97, dtype) for i in range(600)]
    params, starts = map(list, zip(*pairs, strict=True))
    for p in params[::2]:
        p.grad = torch.randn_like(p)
    check(params, starts)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_zero_dimensions_and_a_bare_tensor(backend, dtype):
    p, p0 = pair((), dtype)
    check([p], [p0])
    assert torch.equal(l2sp_penalty(p, p0, STRENGTH), l2sp_penalty([p], [p0], STRENGTH))
    p.grad = None
    l2sp_add_grad_(p, p0, STRENGTH)
    oracle.assert_one_rounding(p.grad, *oracle.l2sp_grad(p, p0, 2 * STRENGTH, None))


def test_all_tensors_empty(backend):
    params, starts = [torch.zeros(0, 3, requires_grad=True)], [torch.zeros(0, 3)]
    assert l2sp_penalty(params, starts, STRENGTH).item() == 0
    assert l2sp_add_grad_(params, starts, STRENGTH).item() == 0
    assert params[0].grad.shape == (0, 3)


def test_large_values_cancel_in_the_difference_only(backend):
    """p - p0 is exact where they are close; the expansion p^2 - 2 p p0 + p0^2 would lose everything here."""
    p0 = 1000 + torch.rand(5000)
    p = (p0 + 2.0**-12 * torch.randint(1, 9, (5000,))).requires_grad_()
    check([p], [p0])


def test_sum_of_many_small_terms(backend):
    """A running fp32 sum stalls here: 2^24 times its term is as far as it gets."""
    p = torch.full((20_000_000,), 0.5, requires_grad=True)
    value = l2sp_penalty([p], [torch.zeros_like(p)], 1.0)
    assert abs(value.item() - 5e6) <= 2e-6 * 5e6


# ----------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layouts(backend, param_layout):
    """Parameter, start and gradient each in their own layout; start also expanded."""
    values, start, before = (torch.randn(3, 4, 5, 6) for _ in range(3))
    for start_layout, grad_layout in itertools.product((*LAYOUTS, "expanded"), (*LAYOUTS, None)):
        memory = lay_out(values, param_layout)
        p = memory.detach().requires_grad_()
        if start_layout == "expanded":
            p0 = start[:1].expand_as(start)
        else:
            p0 = lay_out(start, start_layout)
        grad = None if grad_layout is None else lay_out(before, grad_layout)
        p.grad = grad
        check([p], [p0])
        assert surroundings_intact(memory)
        assert grad is None or (surroundings_intact(grad) and p.grad.stride() == grad.stride())
        assert grad is not None or p.grad.stride() == torch.empty_like(p).stride()


def test_layouts_mixed_with_16_bits(backend):
    for layouts in itertools.permutations(LAYOUTS, 3):
        p, p0, grad = (lay_out(torch.randn(3, 4, 5, 6).bfloat16(), layout) for layout in layouts)
        p.requires_grad_().grad = grad
        check([p, pair(7, torch.float16)[0]], [p0, torch.zeros(7)])
        assert surroundings_intact(grad)


def test_penalty_of_an_expanded_parameter(backend):
    """Reading it is fine; autograd sums over the copies."""
    a, p0 = torch.randn(4, requires_grad=True), torch.randn(3, 4)
    l2sp_penalty([a.expand(3, 4)], [p0], STRENGTH).backward()
    torch.testing.assert_close(a.grad, (2 * STRENGTH * (a.detach() - p0)).sum(0))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_list(backend, data):
    """Any few tensors of any shapes, dtypes and layouts, with and without gradients."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    params, starts = [], []
    for shape in shapes:
        dtype, start_dtype = data.draw(st.sampled_from(PAIRS))
        p, p0 = pair(shape, dtype, start_dtype)
        if len(shape) and data.draw(st.booleans()):
            p = lay_out(p.detach(), data.draw(st.sampled_from(["transposed", "sliced"]))).requires_grad_()
        if data.draw(st.booleans()):
            p.grad = torch.randn_like(p)
        params.append(p)
        starts.append(p0)
    check(params, starts, strength=data.draw(st.sampled_from([0.0, 0.01, 5.0])))


# ------------------------------------------------------------------------------------- grad_scale and threads


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(
    "scale",
    [0.0, 1024, torch.tensor(1024.0), torch.tensor([2.0]), torch.tensor(3.0, dtype=torch.float64)],
    ids=repr,
)
def test_grad_scale_scales_the_gradient_and_not_the_value(backend, dtype, scale):
    p, p0 = pair(50, dtype)
    p.grad = torch.randn_like(p)
    before = p.grad.clone()
    value = l2sp_add_grad_([p], [p0], STRENGTH, grad_scale=scale)
    oracle.assert_norm_close(value, oracle.l2sp([p], [p0], STRENGTH))
    oracle.assert_one_rounding(p.grad, *oracle.l2sp_grad(p, p0, 2 * STRENGTH * float(scale), before))


def test_grad_scale_of_a_gradient_that_would_underflow(backend):
    """fp16: 2 * strength * (p - p0) is below the smallest number, its scaled form is not."""
    p = torch.full((8,), 2.0**-10, dtype=torch.float16, requires_grad=True)
    p.grad = torch.zeros_like(p)
    l2sp_add_grad_([p], [torch.zeros(8)], 2.0**-17, grad_scale=2.0**16)
    assert p.grad.tolist() == [2.0**-10] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threads_do_not_change_a_bit(backend, dtype):
    pairs = [pair(size, dtype) for size in (100_001, 3, 40_000, 17)]
    params, starts = map(list, zip(*pairs, strict=True))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for p in params:
                p.grad = None
            value = l2sp_add_grad_(params, starts, STRENGTH)
            results.append([value, l2sp_penalty(params, starts, STRENGTH), *(p.grad for p in params)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_threads(backend, threads):
    pairs = [pair(size, torch.float32) for size in (100_001, 3, 40_000, 17)]
    check(*map(list, zip(*pairs, strict=True)))


# -------------------------------------------------------------------------------------------------- prox


@pytest.mark.parametrize("dtype, start_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("lr", [1e-9, 0.1, 10.0, 1e30])
def test_prox_is_its_closed_form(backend, dtype, start_dtype, lr):
    pairs = [pair(size, dtype, start_dtype) for size in (1, 17, 1025, 40_000)]
    params, starts = map(list, zip(*pairs, strict=True))
    h = 2 * lr * STRENGTH
    exact = [oracle.blend(p, [p0], 1 / (1 + h), None, [1.0]) for p, p0 in pairs]
    assert l2sp_prox_(params, starts, STRENGTH, lr) is None
    for p, (value, slack) in zip(params, exact, strict=True):
        oracle.assert_one_rounding(p.detach(), value, slack)


def test_prox_is_the_minimiser(backend):
    """Of strength * ||x - p0||^2 + ||x - p||^2 / (2 lr): the gradient there is 0."""
    p, p0 = pair(100, torch.float64)
    lr, x = 0.3, p.detach().clone().requires_grad_()
    l2sp_prox_([x], [p0], STRENGTH, lr)
    objective = STRENGTH * (x - p0).square().sum() + (x - p.detach()).square().sum() / (2 * lr)
    (grad,) = torch.autograd.grad(objective, x)
    assert grad.norm() <= 1e-13 * p.norm()


@pytest.mark.parametrize("strength, lr", [(1e300, 1e300), (1e200, 1e-3)])
def test_prox_of_a_huge_step_lands_on_the_start(backend, strength, lr):
    p, p0 = pair(100, torch.float32)
    l2sp_prox_([p], [p0], strength, lr)
    assert torch.equal(p, p0)


@pytest.mark.parametrize("strength, lr", [(0.0, 1.0), (1.0, 0.0)])
def test_prox_of_no_step_changes_no_bit(backend, strength, lr):
    p, p0 = pair(100, torch.float32)
    before = p.detach().clone()
    l2sp_prox_([p], [torch.full_like(p0, torch.nan)], strength, lr)
    assert torch.equal(p, before)


def test_prox_stays_at_the_start(backend):
    p0 = torch.randn(1000)
    p = p0.clone().requires_grad_()
    for lr in (0.01, 0.3, 7.0):
        l2sp_prox_([p], [p0], STRENGTH, lr)
    assert torch.equal(p, p0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prox_in_any_layout(backend, layout):
    values, start = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    memory = lay_out(values, layout)
    l2sp_prox_(memory.detach().requires_grad_(), start, STRENGTH, 1.0)
    oracle.assert_one_rounding(memory, *oracle.blend(values, [start], 1 / (1 + 2 * STRENGTH), None, [1.0]))
    assert surroundings_intact(memory)


def test_parameters_without_a_start_point_are_read_only(backend):
    """p - 0 is p itself: arithmetic in place on the difference would change the parameter."""
    params = [torch.randn(5, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    before = [p.detach().clone() for p in params]
    grads = [torch.zeros_like(p) for p in params]
    torch.ops.fasttransfer.l2sp_add_grad_(
        [p.detach() for p in params], [None, None], grads, [0.5, 0.25], [], [0, 1], 3.0, None
    )
    for p, old, g, strength in zip(params, before, grads, (0.5, 0.25), strict=True):
        assert torch.equal(p.detach(), old)
        torch.testing.assert_close(g, 2 * strength * 3.0 * old)
