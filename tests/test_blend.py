"""blend and its kin on tensors and lists: numbers against float64, exact cases, layouts, memory."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fasttransfer import EMA, blend, blend_, blend_many, blend_many_
from fasttransfer.ops.blend import blend_dot_op
from tests import oracle
from tests.layouts import LAYOUTS, lay_out, surroundings_intact

# Around a vector of 16 lanes, a block of 1024 and a chunk of 16384 elements of the native kernels, and several chunks.
SIZES = (0, 1, 2, 15, 16, 17, 1023, 1024, 1025, 16383, 16384, 16385, 100_000)
PAIRS = list(itertools.product(oracle.DTYPES, repeat=2))
ALPHAS = (0.0, 1.0, 0.5, 0.1, 0.999, -0.25, 1.75)


def same_bits(a, b):
    """Also of NaN and -0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def check(target, sources, alpha, scale=None, weights=None):
    """The four functions against the oracle, for one target, or for lists: `sources` is then a list of lists."""
    targets = target if isinstance(target, list) else [target]
    columns = [s if isinstance(target, list) else [s] for s in sources]
    coefs = weights or [1 / len(sources)] * len(sources)
    number = float(alpha.detach() if isinstance(alpha, torch.Tensor) else alpha)
    exact = [
        oracle.blend(t, row, number, None if scale is None else float(scale), coefs)
        for t, *row in zip(targets, *columns, strict=True)
    ]
    copies = [t.clone() for t in targets]
    given_target = copies if isinstance(target, list) else copies[0]
    if len(sources) == 1 and weights is None:
        new = blend(target, sources[0], alpha, source_scale=scale)
        returned = blend_(given_target, sources[0], alpha, source_scale=scale)
    else:
        new = blend_many(target, sources, alpha, weights=weights)
        returned = blend_many_(given_target, sources, alpha, weights=weights)
    assert returned is given_target
    for t, out, overwritten, (value, slack) in zip(
        targets, new if isinstance(target, list) else [new], copies, exact, strict=True
    ):
        assert (out.dtype, out.shape, out.stride()) == (t.dtype, t.shape, torch.empty_like(t).stride())
        oracle.assert_one_rounding(out, value, slack)
        assert same_bits(out, overwritten)
    return new


# -------------------------------------------------------------------------------------------- dtypes and sizes


@pytest.mark.parametrize("dtype, source_dtype", PAIRS, ids=str)
def test_every_size_and_alpha(backend, dtype, source_dtype):
    for size, alpha in zip(SIZES, itertools.cycle(ALPHAS)):
        check(torch.randn(size).to(dtype), [torch.randn(size).to(source_dtype)], alpha)
    for alpha in ALPHAS:
        check(torch.randn(50).to(dtype), [torch.randn(50).to(source_dtype)], alpha)


@pytest.mark.parametrize("alpha", [0.1, torch.tensor(0.999), torch.tensor([-0.3]).double()], ids=repr)
def test_one_list_of_all_sizes_and_dtypes(backend, alpha):
    """More than one chunk; chunks are cut through the whole list."""
    targets = [torch.randn(size).to(dtype) for size in SIZES for dtype, _ in PAIRS]
    sources = [torch.randn(size).to(dtype) for size in SIZES for _, dtype in PAIRS]
    check(targets, [sources], alpha)


def test_many_small_tensors(backend):
    check([torch.randn(1 + i % 97) for i in range(600)], [[torch.randn(1 + i % 97) for i in range(600)]], 0.3)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_zero_dimensions_and_no_elements(backend, dtype):
    check(torch.tensor(2.0).to(dtype), [torch.tensor(3.0)], 0.3)
    check(torch.zeros(0, 3).to(dtype), [torch.zeros(0, 3)], 0.3)
    assert blend([], [], 0.5) == []


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.7, 3, torch.tensor(0.3)], ids=repr)
@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.4, torch.tensor(1.0)], ids=repr)
def test_source_scale(backend, alpha, scale):
    for dtype, source_dtype in PAIRS:
        check(torch.randn(100).to(dtype), [torch.randn(100).to(source_dtype)], alpha, scale)


def test_the_plain_sum(backend):
    t, s = torch.randn(1000), torch.randn(1000)
    assert torch.equal(blend(t, s, 1.0, source_scale=1.0), t + s)


@pytest.mark.parametrize(
    "alpha", [0.3, torch.tensor(0.3), torch.tensor(0.3).bfloat16(), torch.nn.Parameter(torch.tensor([0.3]))]
)
def test_alpha_as_a_tensor(backend, alpha):
    check(torch.randn(100), [torch.randn(100)], alpha)
    check([torch.randn(100), torch.randn(3).double()], [[torch.randn(100), torch.randn(3)]], alpha)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_list(backend, data):
    """Any few tensors of any shapes, dtypes and layouts, up to three sources."""
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5))
    count = data.draw(st.integers(1, 3))
    torch.manual_seed(data.draw(st.integers(0, 1000)))

    def draw(shape):
        t = torch.randn(shape).to(data.draw(st.sampled_from(oracle.DTYPES)))
        layouts = ["contiguous", "misaligned", *(["transposed", "sliced"] if shape else [])]
        return lay_out(t, data.draw(st.sampled_from(layouts)))

    targets, *columns = ([draw(shape) for shape in shapes] for _ in range(1 + count))
    weights = data.draw(st.sampled_from([None, [0.5, 0.75, -0.25][:count]]))
    if weights is not None:
        weights[-1] += 1 - sum(weights)
    check(targets, columns, data.draw(st.sampled_from(ALPHAS)), weights=weights)


# ------------------------------------------------------------------------------------------------- k sources


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [1.5, -1.0, 0.5], [0, 1, 0]], ids=repr)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_several_sources(backend, dtype, weights):
    for size in (1, 17, 1025, 40_000):
        t, *sources = (torch.randn(size).to(d) for d in (dtype, torch.bfloat16, torch.float32, dtype))
        for alpha in (0.0, 0.3, 0.9, 1.0, torch.tensor(0.3)):
            check(t, sources, alpha, weights=weights)


def test_one_pass_rounds_once(backend):
    """A bfloat16 soup of 8 models: summed one after the other it would be rounded 8 times."""
    models = [torch.randn(2000).bfloat16() for _ in range(9)]
    check(models[0], models[1:], 1 / 9)


def test_weights_that_sum_to_one_but_for_rounding(backend):
    x = torch.randn(100)
    out = blend_many(x, [x.clone() for _ in range(10)], 0.3, weights=[0.1] * 10)
    torch.testing.assert_close(out, x)


def test_a_source_of_weight_zero_is_not_read(backend):
    t, s, nan = torch.randn(100), torch.randn(100), torch.full((100,), torch.nan)
    assert torch.equal(blend_many(t, [s, nan], 0.3, weights=[1, 0]), blend(t, s, 0.3))
    assert torch.equal(blend_many(t, [nan, s], 0.3, weights=[0, 1]), blend(t, s, 0.3))


# -------------------------------------------------------------------------------------------------- exact cases


@pytest.mark.parametrize("dtype, source_dtype", PAIRS, ids=str)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_alpha_one_and_zero_copy_bits(backend, dtype, source_dtype, tensor):
    """Whatever the other side holds."""
    values = torch.tensor([0.0, -0.0, 1.5, -3.25, 1e-3, 100.0] * 7)
    nan = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0, torch.nan] * 7)
    one, zero = (torch.tensor(1.0), torch.tensor(0.0)) if tensor else (1.0, 0.0)
    target, source = values.to(dtype), nan.to(source_dtype)
    assert same_bits(blend(target, source, one), target)
    assert same_bits(blend_(target.clone(), source, one), target)
    target, source = nan.to(dtype), values.to(source_dtype)
    assert same_bits(blend(target, source, zero), source.to(dtype))
    assert same_bits(blend_(target, source, zero), source.to(dtype))


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.3])
def test_the_result_is_new_memory(backend, alpha):
    target, source = torch.randn(5), torch.randn(5)
    before = target.clone(), source.clone()
    blend(target, source, alpha).fill_(7)
    assert torch.equal(target, before[0])
    assert torch.equal(source, before[1])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [1 / 3, 1 / 3, 1 / 3], [0.2, 0.5, 0.3], [-0.5, 1.5]], ids=repr
)
def test_equal_operands_stay(backend, dtype, weights):
    x = torch.randn(1000).to(dtype)
    for alpha in (0.1, 0.3, 0.5, 0.9, 0.999, 1 / 3, torch.tensor(0.7)):
        assert torch.equal(blend_many(x, [x.clone() for _ in weights], alpha, weights=weights), x)


def test_average_that_has_arrived_stays(backend):
    """alpha x + (1 - alpha) x with both rounded drifts away from x; 10,000 steps would show it."""
    x = torch.randn(1000)
    average = x.clone()
    for _ in range(10_000):
        blend_(average, x, 0.999)
    assert torch.equal(average, x)


def test_average_arrives(backend):
    """From elsewhere it stops where a step is less than half a unit in the last place: 1000 units away at 0.999."""
    x = torch.rand(1000) + 1
    average = torch.zeros(1000)
    for _ in range(20_000):
        blend_(average, x, 0.999)
    assert ((average - x).abs() <= 1000 * 2.0**-23).all()
    average, x = average.double(), x.double()
    for _ in range(1000):
        blend_(average, x, 0.9)
    assert ((average - x).abs() <= 10 * 2.0**-52).all()


# ------------------------------------------------------------------------------------- layouts, threads, memory


@pytest.mark.parametrize("target_layout", LAYOUTS)
def test_layouts(backend, target_layout):
    """The result has the target's; sources in any, also expanded."""
    values = [torch.randn(3, 4, 5, 6) for _ in range(3)]
    for layout, second in itertools.product(LAYOUTS, ("contiguous", "transposed", "expanded")):
        target = lay_out(values[0], target_layout)
        sources = [lay_out(values[1], layout)]
        if second == "expanded":
            sources.append(values[2][:1].expand_as(values[2]))
        else:
            sources.append(lay_out(values[2], second))
        for alpha in (0.2, 0.8):
            check(target, sources, alpha)
            check(target.bfloat16(), sources[:1], alpha)
        expected = blend_many(target, sources, 0.3)
        assert same_bits(blend_many_(target, sources, 0.3), expected)
        assert surroundings_intact(target)


def test_threads(backend, threads):
    targets, *columns = ([torch.randn(size) for size in (100_001, 3, 40_000)] for _ in range(4))
    check(targets, columns, 0.3)


def test_threads_do_not_change_a_bit(backend):
    targets, *columns = ([torch.randn(size) for size in (100_001, 3, 40_000)] for _ in range(4))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(blend_many(targets, columns, 0.3))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(one, two) for one, two in zip(*results, strict=True))


def test_a_source_that_is_the_target(backend):
    a, b = torch.randn(5), torch.randn(5)
    expected = blend_many(a, [a.clone(), b], 0.5)
    assert torch.equal(blend_many_(a, [a, b], 0.5), expected)
    expected = 2 * a
    assert torch.equal(blend_(a, a, 1.0, source_scale=1.0), expected)


def test_neighbours_in_one_memory(backend):
    """Rows of one tensor: weights and their average in one flat buffer."""
    memory = torch.randn(4, 5)
    expected = [blend(memory[0], memory[1], 0.3), memory[1].clone(), blend(memory[2], memory[3], 0.3)]
    blend_([memory[0], memory[2]], [memory[1], memory[3]], 0.3)
    assert all(torch.equal(a, b) for a, b in zip(expected, memory, strict=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: (m[:1].expand(3), torch.zeros(3)),
        lambda m: (m.unfold(0, 3, 1), torch.zeros(6, 3)),
        lambda m: (m[:5], m[3:8]),
        lambda m: (m[:4].view(2, 2), m[:4].view(2, 2).t()),
        lambda m: ([m[:5], m[3:]], [torch.zeros(5), torch.zeros(5)]),
        lambda m: ([m[:4], m[4:]], [m[4:], m[:4]]),
        lambda m: ([m, m], [torch.zeros(8), torch.ones(8)]),
        lambda m: ({"a": m, "b": m}, {"a": torch.zeros(8), "b": torch.ones(8)}),
    ],
    ids=["expanded", "unfolded", "shifted", "transposed", "targets", "crossed", "twice", "named"],
)
def test_overlaps_are_refused_and_nothing_is_written(make):
    memory = torch.arange(8.0)
    target, source = make(memory)
    with pytest.raises(ValueError, match=r"overwritten|same memory"):
        blend_(target, source, 0.5)
    assert torch.equal(memory, torch.arange(8.0))
    blend(target, source, 0.5)  # which only reads


def test_conv_weights_in_channels_last(backend):
    convs = [torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    out = blend(convs[0], convs[1], 0.3)["weight"]
    assert out.is_contiguous(memory_format=torch.channels_last)
    oracle.assert_one_rounding(
        out.detach(), *oracle.blend(convs[0].weight, [convs[1].weight.detach()], 0.3, None, [1.0])
    )
    blend_(convs[0], torch.nn.Conv2d(3, 8, 3), 0.0)
    assert convs[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_more_than_2_to_the_31_elements():
    """Their places do not fit 32 bits. What nobody has written is one page of zeros: only the target takes memory."""
    n = 2**31 + 5
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        free = 0
    if free < 4 * n:
        pytest.skip(f"needs {4 * n >> 30} GB of free memory")
    target, source = (torch.empty(n, dtype=torch.bfloat16) for _ in range(2))
    at = [0, 2**31 - 1, 2**31, n - 1]
    target[at], source[at] = torch.tensor([[1.0, 3, 5, 7], [2.0, 5, 8, 11]]).bfloat16()
    before = blend_dot_op([target], [target, source], [1.0, -1.0])
    assert before.item() == -(1 * 1 + 3 * 2 + 5 * 3 + 7 * 4)
    blend_(target, source, 0.5)
    assert target[at].tolist() == [1.5, 4, 6.5, 9]


def test_values_are_not_read_on_the_host():
    """Where there are none to read: a call that needs one waits for the device, and no CUDA graph captures it."""
    with torch.device("meta"):
        t, s = [torch.empty(3), torch.empty(2, 2).bfloat16()], [torch.empty(3), torch.empty(2, 2)]
        alpha = torch.empty((), requires_grad=True)
        out = blend(t, s, alpha, source_scale=alpha)
        assert [(x.shape, x.dtype) for x in out] == [(x.shape, x.dtype) for x in t]
        assert torch.autograd.grad(out[0].sum() + out[1].float().sum(), alpha)[0].shape == ()
        assert blend_(t, s, alpha.detach()) is t
        assert blend_many_(t, [s, s], alpha.detach()) is t
        model = torch.nn.BatchNorm1d(3)
        EMA(model, capturable=True).update(model)
