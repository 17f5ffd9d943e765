"""The CUDA kernels of kd on the CPU: every path at every length that changes it, and the bytes that it asks for."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracle
from tests.backends import running
from tests.kd_calls import check_kd
from tests.simt import build, library

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))

# (machine, dtype, vocabulary, gradient) and what must run: blocks per cluster, or 0 for two sweeps, -1 for registers.
PATHS = [
    ("sm_90", BF16, 2, True, -1),
    ("sm_90", F32, 1024, True, -1),
    ("sm_90", F16, 1000, False, -1),
    ("sm_90", BF16, 1025, True, 1),
    ("sm_90", F32, 4099, True, 1),
    ("sm_90", F16, 8192, False, 1),
    ("sm_90", BF16, 32000, True, None),  # as many blocks as the plan finds best
    ("sm_90", BF16, 128256, True, None),
    ("sm_90", F32, 128256, True, None),
    ("sm_90", BF16, 200_001, True, None),
    ("sm_90", BF16, 200_001, False, None),
    ("sm_80", BF16, 200_001, False, 0),
    ("sm_80", F32, 9001, True, 1),
    ("sm_80", BF16, 128256, True, 0),
    ("sm_80", F16, 200_001, True, 0),
    ("tiny", F32, 1025, True, None),
    ("tiny", BF16, 3001, True, 2),
    ("tiny", F32, 1900, True, 2),
    ("tiny", F32, 5001, True, 0),
]
WIDTHS = (2, 3, 7, 31, 255, 256, 257, 1000, 1023, 1024, 1025, 2047, 4099, 17_000, 50_257, 128_256, 200_001)


@pytest.fixture
def simt():
    with running("simt"):
        if not library.has("kd"):
            pytest.skip("csrc/cuda has no kernel for kd")
        yield


def name_of(value):
    return str(value).removeprefix("torch.")


def logits(rows, columns, dtype, teacher_dtype=None):
    return (3 * torch.randn(rows, columns)).to(dtype), (3 * torch.randn(rows, columns)).to(
        teacher_dtype or dtype
    )


def call(
    student,
    teacher,
    labels=None,
    weight=None,
    temperature=None,
    *,
    label_weight=0.0,
    reduction="sum",
    grad=True,
):
    options = (1.0, label_weight, 0.0, -100, False, student.shape[-1], reduction, True, grad)
    with library.launches() as launches:
        result = torch.ops.fasttransfer.kd(student, teacher, labels, weight, temperature, None, [], *options)
    return result, launches


@pytest.mark.parametrize("machine, dtype, columns, grad, cluster", PATHS, ids=name_of)
def test_path_and_bytes(simt, monkeypatch, machine, dtype, columns, grad, cluster):
    """Which kernel runs; and that it asks for 3 s V + c bytes per row, 5 s V + c in two sweeps, as kd.cuh says."""
    rows = 3
    student, teacher = logits(rows, columns, dtype)
    with library.machine(machine):
        _, (main, *_) = call(student, teacher, grad=grad)
    monkeypatch.setenv("FASTTRANSFER_KD_PLAN", "path=sweep")
    _, (sweep, *_) = call(*logits(1, 10, dtype), grad=grad)
    in_registers, swept = main.shared_bytes == 0, main.shared_bytes == sweep.shared_bytes
    if cluster is not None:
        assert (-1 if in_registers else 0 if swept else main.cluster) == cluster
    else:
        assert not in_registers
        assert not swept
    passes = (5 if swept else 3) if grad else 2
    size = student.element_size()
    constant = 8 + (4 if grad and dtype == F16 else 0)
    assert main.bytes == rows * (passes * size * columns + constant)


@pytest.mark.parametrize("columns", [100, 5000, 60_000])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_bytes_of_the_options_of_a_row(simt, reduction, columns):
    """8 (label) + 4 (weight) + 4 (temperature) + the label's logit for each block of a cluster, 16 for divisors."""
    rows = 4
    student, teacher = logits(rows, columns, BF16)
    labels, weight, temperature = torch.arange(rows), torch.rand(rows) + 0.5, torch.rand(rows) + 1.5
    _, launches = call(student, teacher, labels, weight, temperature, label_weight=0.5, reduction=reduction)
    main = max(launches, key=lambda launch: launch.bytes)
    options = 8 + 4 + 4 + 2 + (16 if reduction == "mean" else 0)
    constant = (4 if reduction == "none" else 8) + main.cluster * options
    assert main.bytes == rows * (3 * 2 * columns + constant)
    others = {"none": 0, "sum": rows * 8 + 4, "mean": rows * 8 + 4 + rows * (8 + 4) + 16}
    assert sum(launch.bytes for launch in launches) - main.bytes == others[reduction]


def test_rows_that_are_not_counted_are_not_read(simt):
    student, teacher = logits(4, 3000, BF16)
    labels = torch.tensor([5, -100, -100, 7])
    student[1], teacher[2] = math.nan, math.nan
    (loss, grad, _), (main, *_) = call(student, teacher, labels, label_weight=0.5)
    assert loss.isfinite()
    assert not grad[1:3].any()
    assert main.bytes == 2 * (3 * 2 * 3000 + 8 + main.cluster * (8 + 2)) + 2 * (
        2 * 3000 + 8 + main.cluster * 8
    )


@pytest.mark.parametrize("machine", ["sm_90", "sm_80", "tiny"])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=name_of)
def test_every_length(simt, dtype, machine):
    """Rows from 2 to 200,001 logits, so of every path, misaligned where the length is odd."""
    with library.machine(machine):
        for columns in WIDTHS:
            if machine != "sm_90" and 17_000 <= columns < 200_000:
                continue
            student, teacher = logits(3, columns, dtype)
            labels = torch.tensor([columns - 1, -100, 0])
            check_kd(student, teacher, temperature=2.0)
            if columns < 60_000:
                check_kd(student, teacher, labels, label_weight=0.3, temperature=3.0, label_smoothing=0.1)


@pytest.mark.parametrize("teacher_dtype", oracle.DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=name_of)
def test_any_two_types(simt, dtype, teacher_dtype):
    for columns in (2, 300, 5001):
        check_kd(*logits(3, columns, dtype, teacher_dtype), temperature=2.0)


@pytest.mark.parametrize(
    "plan", ["path=row,cluster=1", "path=row,cluster=8,threads=96", "path=sweep", "path=any"]
)
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_plans_agree(simt, monkeypatch, plan, order):
    """A forced plan computes the same, whichever thread comes first."""
    monkeypatch.setenv("FASTTRANSFER_KD_PLAN", plan)
    with library.machine(order=order):
        for dtype in (F32, BF16, F16):
            student, teacher = logits(5, 2003, dtype)
            check_kd(student, teacher, temperature=2.0)
            check_kd(student, teacher, torch.arange(5), label_weight=0.5, temperature=2.0)


def test_the_result_does_not_depend_on_the_order_of_threads(simt):
    """Blocks and threads run in any order on a GPU; the sums are those of a tree."""
    for columns in (50, 700, 3001, 40_000):
        student, teacher = logits(7, columns, F32)
        results = []
        for order in ("forward", "reverse"):
            with library.machine(order=order):
                results.append(call(student, teacher)[0])
        (loss, grad, _), (other_loss, other_grad, _) = results
        assert torch.equal(loss, other_loss)
        assert torch.equal(grad, other_grad)


def test_an_error_of_a_launch_is_an_exception(simt, monkeypatch):
    monkeypatch.setenv("FASTTRANSFER_KD_PLAN", "path=row,cluster=2")
    with library.machine("sm_80"), pytest.raises(RuntimeError, match="too large"):
        call(*logits(2, 2000, BF16))
