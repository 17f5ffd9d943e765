"""Plain lists of tensors, which blend_ and blend_many_ serve in one call past the general checks."""

import pytest
import torch

from fasttransfer import blend_, blend_many, blend_many_
from fasttransfer.ops.blend import blend_plain_op
from tests.layouts import LAYOUTS, lay_out, surroundings_intact

SHAPES = [(3,), (2, 5, 3, 4), (), (0,), (300,), (4, 1, 1, 2)]
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def call(target, sources, alpha):
    """Through the function for as many sources."""
    if len(sources) == 1:
        return blend_(target, sources[0], alpha)
    return blend_many_(target, sources, alpha)


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sources", [1, 2, 3, 7])
def test_dtypes_and_numbers_of_sources(backend, sources, dtype, source_dtype):
    target = [torch.randn(shape).to(dtype) for shape in SHAPES]
    given = [[torch.randn(shape).to(source_dtype) for shape in SHAPES] for _ in range(sources)]
    for alpha in (0.75, 0.25, 0.0, 1.0, -0.5):
        expected = [
            alpha * t.double() + (1 - alpha) * sum(s.double() for s in row) / sources
            for t, *row in zip(target, *given, strict=True)
        ]
        assert call(target, given, alpha) is target
        for t, e in zip(target, expected, strict=True):
            scale = 1 + sum(float(s[i].abs().max()) for s in given for i in [1])
            assert (t.double() - e).abs().le(DTYPES[dtype] * scale).all()


@pytest.mark.parametrize("container", [list, tuple])
def test_lists_and_tuples(backend, container):
    target = container(torch.ones(3) for _ in range(4))
    source = container(torch.zeros(3) for _ in range(4))
    assert blend_(target, source, 0.75) is target
    assert blend_many_(target, (source, list(source)), 0.5) is target
    assert all(t.tolist() == [0.375] * 3 for t in target)


@pytest.mark.parametrize("source_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sources", [1, 2])
def test_layouts(backend, sources, layout, source_layout):
    values = [torch.randn(2, 5, 3, 4) for _ in range(3)]
    target = [lay_out(v, layout) for v in values]
    given = [[lay_out(v * 2, source_layout) for v in values] for _ in range(sources)]
    call(target, given, 0.75)
    for t, v in zip(target, values, strict=True):
        torch.testing.assert_close(t, lay_out(v * 1.25, "contiguous"), rtol=1e-6, atol=1e-6)
        assert surroundings_intact(t)


def test_a_size_of_one_may_have_any_stride(backend):
    target = [torch.ones(2, 1).as_strided((2, 1), (1, 7)), torch.ones(2)]
    blend_(target, [torch.zeros(2, 1), torch.zeros(2)], 0.75)
    assert target[0].tolist() == [[0.75], [0.75]]


@pytest.mark.parametrize("sources", [1, 3])
def test_a_target_in_the_memory_of_another_tensor(backend, sources):
    """Found wherever in the lists it stands, and whatever the order of the addresses."""
    for where in (0, 17, 29):
        for reverse in (False, True):
            target = [torch.ones(8) for _ in range(30)]
            given = [[torch.zeros(8) for _ in range(30)] for _ in range(sources)]
            given[-1][(where + 5) % 30] = target[where]
            if reverse:
                target.reverse()
            with pytest.raises(ValueError, match="overlap"):
                call(target, given, 0.75)
            assert all((t.tolist(), t._version) == ([1] * 8, 0) for t in target)
    memory = torch.ones(6)
    with pytest.raises(ValueError, match="overlap"):
        call([memory[:4], memory[3:5]], [[torch.zeros(4), torch.zeros(2)]] * sources, 0.75)
    assert memory.tolist() == [1] * 6


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t]], ids=["tensor", "list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [4, 100_000])
def test_one_tensor_in_the_memory_of_its_source(backend, size, dtype, wrap):
    memory = torch.arange(size + 1).to(dtype)
    before = memory.clone()
    for target, source in ((memory[:-1], memory[1:]), (memory[1:], memory[:-1])):
        version = memory._version
        with pytest.raises(ValueError, match="overlap"):
            blend_(wrap(target), wrap(source), 0.75)
        assert torch.equal(memory, before)
        assert memory._version == version


def test_sources_may_share_memory(backend):
    target, source = [torch.ones(3), torch.ones(3)], torch.zeros(3)
    blend_many_(target, [[source, source], [source, source]], 0.75)
    blend_(target, [source.expand(3), source.view(3)], 0.5)
    assert [t.tolist() for t in target] == [[0.375] * 3] * 2


def test_a_tensor_blended_with_itself(backend):
    target = [torch.randn(5), torch.randn(3)]
    before = [t.clone() for t in target]
    blend_(target, target, 0.75)
    assert all(torch.equal(t, b) for t, b in zip(target, before, strict=True))


# ------------------------------------------------------------------------------------------- what a refusal leaves


@pytest.mark.parametrize("sources", [1, 2])
def test_a_refused_list_is_neither_written_nor_counted(backend, sources):
    """A version counted for nothing would make a backward fail that is right."""
    x, target = torch.randn(3, requires_grad=True), [torch.ones(3), torch.ones(2)]
    out = (x * target[0]).sum()
    for wrong in (torch.zeros(3), torch.zeros(2).int(), torch.zeros(2).to_sparse(), target[1][:1]):
        with pytest.raises((TypeError, ValueError)):
            call(target, [[torch.zeros(3), wrong]] * sources, 0.75)
        with pytest.raises((TypeError, ValueError)):
            call(target, [[torch.zeros(3)]] * sources, 0.75)
    assert [t.tolist() for t in target] == [[1] * 3, [1] * 2]
    assert [t._version for t in target] == [0, 0]
    out.backward()


@pytest.mark.parametrize("sources", [1, 2])
def test_every_target_of_a_list_is_counted(backend, sources):
    target, given = [torch.ones(3), torch.ones(2)], [[torch.zeros(3), torch.zeros(2)] for _ in range(sources)]
    call(target, given, 0.75)
    assert all(t._version > 0 for t in target)
    assert all(s._version == 0 for source in given for s in source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sources", [1, 2])
def test_an_inference_tensor_among_others(backend, sources, dtype):
    with torch.inference_mode():
        inference = torch.ones(3, dtype=dtype)
    target = [torch.ones(3, dtype=dtype), inference]
    with pytest.raises(ValueError, match="inference"):
        call(target, [[torch.zeros(3), torch.zeros(3)]] * sources, 0.75)
    with pytest.raises(ValueError, match="inference"):
        call(inference, [torch.zeros(3)] * sources, 0.75)
    assert [t.tolist() for t in target] == [[1] * 3] * 2
    assert target[0]._version == 0


# ----------------------------------------------------------------------------------------------------- the operator


def test_the_operator_refuses_without_a_word(one_backend):
    def refused(targets, sources, weights):
        before = [t.clone() for t in targets]
        assert blend_plain_op(targets, sources, 0.5, weights) is False
        assert all(torch.equal(t, b) for t, b in zip(targets, before, strict=True))

    a, b, c = torch.ones(2), torch.zeros(2), torch.zeros(3)
    refused([a], [c], [1.0])
    refused([a], [b, b], [1.0])
    refused([a], [b], [0.5, 0.5])
    refused([a], [b], [])
    refused([a], [a], [1.0])
    refused([a], [b.int()], [1.0])
    refused([torch.ones(4)[::2]], [b], [1.0])
    refused([torch.ones(2, 3).t()], [torch.zeros(3, 2)], [1.0])


def test_the_operator_counts_its_writes(one_backend):
    target = torch.ones(2)
    blend_plain_op([target], [torch.zeros(2)], 0.5, [1.0])
    assert target._version > 0


def test_lists_of_all_lengths_over_threads(backend, threads):
    for count in (1, 2, 50, 700):
        target = [torch.full((997,), float(i)) for i in range(count)]
        blend_(target, [torch.zeros(997) for _ in range(count)], 0.75)
        assert all((t == 0.75 * i).all() for i, t in enumerate(target))


def test_task_vectors_are_added_and_subtracted(backend):
    """base + sum_i l_i (tuned_i - base): weights that need not sum to 1, nor to anything but 0."""
    base, tuned = [torch.randn(50)], [[torch.randn(50)] for _ in range(3)]
    for shares in ([0.5, 0.3, -0.2], [1.0, -1.0, 0.0], [2.0, 1.0, 1.0]):
        expected = base[0].double()
        expected = expected + sum(x * (t[0].double() - expected) for x, t in zip(shares, tuned, strict=True))
        out = blend_many(base, tuned, 1 - sum(shares), weights=shares, source_scale=1.0)
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-6, atol=1e-6)
        inplace = [base[0].clone()]
        blend_many_(inplace, tuned, 1 - sum(shares), weights=shares, source_scale=1.0)
        assert torch.equal(inplace[0], out[0])
    with pytest.raises(ValueError, match="weights must sum to 1 without source_scale"):
        blend_many(base, tuned, 0.5, weights=[1.0, -1.0, 0.0])
