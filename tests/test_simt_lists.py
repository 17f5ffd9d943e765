"""The CUDA kernels of l2sp and blend on the CPU: how many launches a list takes, and the bytes they ask for.

That the numbers are right, test_l2sp*.py and test_blend*.py say on the backend `simt` as on the others; every way of
reading is in tests/simt/cases_l2sp.cpp and cases_blend.cpp.
"""

from __future__ import annotations

import pytest
import torch

from tests.backends import running
from tests.simt import build, library

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))
SIZES = (1, 2, 7, 16, 1000, 16384, 16385, 50_001)
CHUNK = 16384


@pytest.fixture
def simt():
    with running("simt"):
        yield


def a_list(sizes=SIZES, dtype=torch.float32):
    return [torch.randn(n).to(dtype) for n in sizes]


def partial_sums(sizes):
    """Written and read: 16 bytes for each block, of a chunk each; 4 for the value."""
    return 16 * sum(-(-n // CHUNK) for n in sizes) + 4


def add_grad(params, start, grads, accumulate=1, scale=None):
    with library.launches() as launches:
        torch.ops.fasttransfer.l2sp_add_grad_(params, start, grads, [0.5], [], [accumulate], 1.0, scale)
    return launches


@pytest.mark.parametrize("accumulate, bytes_of_one", [(1, 16), (0, 12)])
def test_bytes_of_l2sp_with_its_gradient(simt, accumulate, bytes_of_one):
    """16 per fp32 parameter; 12 where the gradient is written, not added to."""
    launches = add_grad(a_list(), a_list(), a_list(), accumulate)
    assert len(launches) == 2  # the list, and the sum of its partial sums
    assert sum(launch.bytes for launch in launches) == bytes_of_one * sum(SIZES) + partial_sums(SIZES)


def test_bytes_of_the_value_alone(simt):
    with library.launches() as launches:
        torch.ops.fasttransfer.l2sp_value(a_list(), a_list(), [0.5], [])
    assert sum(launch.bytes for launch in launches) == 8 * sum(SIZES) + partial_sums(SIZES)


def test_bytes_of_l2sp_in_16_bits(simt):
    launches = add_grad(*(a_list(dtype=torch.bfloat16) for _ in range(3)))
    assert sum(launch.bytes for launch in launches) == 8 * sum(SIZES) + partial_sums(SIZES)


@pytest.mark.parametrize("sources", [1, 2, 5])
def test_bytes_of_blend(simt, sources):
    """4 (k + 2) per fp32 element, and nothing else."""
    targets, others = a_list(), a_list(SIZES * sources)
    others = [torch.randn(t.shape) for t in targets for _ in range(sources)]
    weights = [1 / sources] * sources
    with library.launches() as launches:
        torch.ops.fasttransfer.blend(targets, others, [0.6] * len(targets), None, [], None, weights)
    assert len(launches) == 1
    assert launches[0].bytes == 4 * (sources + 2) * sum(SIZES)


def test_what_has_no_weight_is_not_read(simt):
    targets = a_list()
    with library.launches() as launches:
        torch.ops.fasttransfer.blend(targets, a_list(), [1.0] * len(targets), None, [], None, [1.0])
    assert launches[0].bytes == 8 * sum(SIZES)


@pytest.mark.parametrize("tensors, expected", [(1, 1), (400, 1), (1200, 3)])
def test_launches_of_a_long_list(simt, tensors, expected):
    """One for most models; never one per tensor."""
    lists = [a_list([3] * tensors) for _ in range(3)]
    assert len(add_grad(*lists)) == expected + 1
    with library.launches() as launches:
        torch.ops.fasttransfer.blend_(lists[0], lists[1], [0.5] * tensors, None, [], None, [1.0])
    assert len(launches) <= expected


def test_the_result_does_not_depend_on_the_order_of_threads(simt):
    params, start = a_list(), a_list()
    values = []
    for order in ("forward", "reverse"):
        with library.machine(order=order):
            values.append(torch.ops.fasttransfer.l2sp_value(params, start, [0.5], []))
    assert torch.equal(*values)
