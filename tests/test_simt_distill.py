"""The CUDA kernels of distill on the CPU: the bytes that every path asks for, and what must not change a result."""

from __future__ import annotations

import math

import pytest
import torch

from tests.backends import running
from tests.simt import build, library

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))

ARGS = {"forward_kl": [], "reverse_kl": [], "jsd": [0.3], "tvd": [], "decoupled": [1.0, 8.0]}
COLUMNS = 700


@pytest.fixture
def simt():
    with running("simt"):
        if not library.has("distill"):
            pytest.skip("csrc/cuda has no kernel for distill")
        yield


def logits(rows, dtype, teacher_dtype=None, columns=COLUMNS):
    return (3 * torch.randn(rows, columns)).to(dtype), (3 * torch.randn(rows, columns)).to(
        teacher_dtype or dtype
    )


def call(
    student,
    teacher,
    name,
    labels=None,
    weight=None,
    temperature=None,
    *,
    label_weight=0.0,
    reduction="sum",
    standardize=False,
    softcap=0.0,
    grads=(True, True),
    stats=False,
):
    rows = (labels, weight, temperature, None, [], 2.0, label_weight, 0.0, -100, False, student.shape[-1])
    options = (reduction, True, name, ARGS[name], standardize, [softcap, softcap], grads[1], stats, grads[0])
    with library.launches() as launches:
        result = torch.ops.fasttransfer.distill(student, teacher, *rows, *options)
    return result, launches


def sweeps(name, grads, standardize, half):
    """As distill.cuh numbers them."""
    terms, gradient = name in ("jsd", "tvd"), any(grads)
    return 2 + standardize + terms + (standardize and gradient) + (half and gradient) + gradient


@pytest.mark.parametrize("name", ARGS)
@pytest.mark.parametrize("grads", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("standardize", [False, True], ids=["plain", "standardize"])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F64)], ids=str)
def test_bytes(simt, name, grads, standardize, dtypes):
    rows = 2
    student, teacher = logits(rows, *dtypes)
    labels = torch.arange(rows) if name == "decoupled" else None
    _, (main, *_) = call(student, teacher, name, labels, grads=grads, standardize=standardize)
    s, t = student.element_size(), teacher.element_size()
    halves = sum(
        want and dtype == F16 for want, dtype in zip(grads, dtypes, strict=True)
    )  # scales that are stored
    constant = 8 + s + t + (8 + s + t if name == "decoupled" else 0) + 4 * halves
    per_logit = sweeps(name, grads, standardize, halves > 0) * (s + t) + grads[0] * s + grads[1] * t
    assert main.bytes == rows * (COLUMNS * per_logit + constant)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_bytes_of_the_options_of_a_row(simt, reduction):
    """8 (label) + 4 (weight) + 4 (temperature) + the label's logit, 16 for divisors, 20 for the statistics."""
    rows = 3
    student, teacher = logits(rows, BF16)
    labels, weight, temperature = torch.arange(rows), torch.rand(rows) + 0.5, torch.rand(rows) + 1.5
    _, launches = call(
        student, teacher, "reverse_kl", labels, weight, temperature, label_weight=0.5, reduction=reduction,
        stats=True,
    )  # fmt: skip
    main = max(launches, key=lambda launch: launch.bytes)
    constant = (4 if reduction == "none" else 8) + 4 + 8 + 4 + 4 + 2 + (16 if reduction == "mean" else 0) + 20
    assert main.bytes == rows * ((3 * 4 + 4) * COLUMNS + constant)
    others = {"none": 0, "sum": rows * 8 + 4, "mean": rows * 8 + 4 + rows * (8 + 4) + 16}
    assert sum(launch.bytes for launch in launches) - main.bytes == others[reduction]


def test_rows_without_logits_or_not_counted_are_read_no_further(simt):
    student, teacher = logits(3, F32)
    student[1], teacher[1], student[2, 5] = math.nan, math.nan, math.nan
    (loss, grad, _, teacher_grad, *_), (main, *_) = call(
        student, teacher, "jsd", torch.tensor([1, -100, 2]), reduction="none"
    )
    assert loss[:2].isfinite().all()
    assert loss[2].isnan()
    assert not grad[1].any()
    assert not teacher_grad[1].any()
    assert grad[2].isnan().all()
    assert teacher_grad[2].isnan().all()
    # Four sweeps and a gradient of both sides; none; one.
    assert main.bytes == (5 * 8 + 0 * 8 + 8 + 8 + 8) * COLUMNS + 3 * (8 + 4) + 2 * 8


def test_label_term_alone_does_not_read_the_teacher(simt):
    student, teacher = logits(2, F32)
    teacher[:] = math.nan
    (_, grad, *_), (main, *_) = call(student, teacher, "tvd", torch.arange(2), label_weight=1.0)
    assert grad.isfinite().all()
    assert main.bytes == 2 * ((3 * 4 + 2 * 4) * COLUMNS + 8 + 8 + 4)


@pytest.mark.parametrize("name", ARGS)
def test_the_same_in_any_order_and_with_or_without_gradients(simt, name):
    student, teacher = logits(3, F32)
    labels = torch.tensor([3, 5, -100])
    options = {"label_weight": 0.3, "standardize": True, "softcap": 5.0}
    results = []
    for order in ("forward", "reverse"):
        with library.machine(order=order):
            results.append(call(student, teacher, name, labels, **options)[0])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for grads in ((False, False), (True, False), (False, True)):
        assert torch.equal(call(student, teacher, name, labels, grads=grads, **options)[0][0], results[0][0])
