"""The CUDA kernel of topk_kd on the CPU: rows of several segments, every machine and order, the bytes it asks for."""

import pytest
import torch

from tests import oracle
from tests.backends import running
from tests.simt import build, library
from tests.topk_calls import check_topk

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))


@pytest.fixture
def simt():
    with running("simt"):
        if not library.has("topk_kd"):
            pytest.skip("csrc/cuda has no kernel for topk_kd")
        yield


@pytest.mark.parametrize("machine, order", [("sm_90", "forward"), ("tiny", "forward"), ("tiny", "reverse")])
def test_rows_of_several_segments(simt, machine, order):
    """`tiny` has bits for 70 thousand columns: indices on both sides of the border, repeated ones too."""
    columns = 100_003
    s, values = 3 * torch.randn(2, columns), torch.tensor([[-1.0, -2, -3, -1, -2]]).repeat(2, 1)
    indices = torch.tensor([[100_002, 0, 73_000, 100_002, 31], [32, 99_999, 32, -1, 255]])
    with library.machine(machine, order=order):
        for tail in ("renormalize", "bucket"):
            labels = torch.tensor([73_000, 99_000])
            check_topk(s, values, indices, labels, label_weight=0.3, tail=tail, teacher_form="log_probs")


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_bytes(simt, dtype):
    """2 s V + g V, without the columns of K in a sweep of their own: each is read once per sweep and written once."""
    rows, columns, k = 3, 1000, 7
    values, indices = torch.randn(rows, columns).to(dtype).topk(k)
    s = torch.randn(rows, columns).to(dtype)
    tail = (None, None, None, None, [], 1.0, 0.0, 0.0, -100, False, columns, "sum", True, "renormalize")
    size = s.element_size()
    for want_grad, passes in ((True, 2), (False, 1)):
        with library.launches() as launches:
            torch.ops.fasttransfer.topk_kd(s, values, indices, *tail, want_grad)
        scale = 4 if want_grad and dtype == torch.float16 else 0
        row = (3 if want_grad else 1) * size * columns + passes * k * (8 + size) + 8 + scale
        assert launches[0].bytes == rows * row
