"""decoupled_kd_loss against float64."""

from __future__ import annotations

import math

import pytest
import torch

from fasttransfer import DecoupledKDLoss, decoupled_kd_loss, kd_loss
from tests import distill_oracle, oracle
from tests.test_distill import assert_loss, assert_near

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def check(student, teacher, labels, *, weights=(1.0, 8.0), mass=8.0, **options):
    leaf, other = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    loss = decoupled_kd_loss(
        leaf, other, labels, target_weight=weights[0], nontarget_weight=weights[1], **options
    )
    grad, teacher_grad = torch.autograd.grad(loss.sum(), (leaf, other))
    options.setdefault("label_weight", 0.0)
    exact = distill_oracle.distill(
        student, teacher, labels, divergence="decoupled", weights=weights, **options
    )
    t = options.get("temperature", 1.0)
    t = t.max().item() if isinstance(t, torch.Tensor) else t
    assert_loss(loss.detach(), exact.loss, 3 * t)
    assert_near(grad, exact.student_grad, mass * max(t, 1.0))
    assert_near(teacher_grad, exact.teacher_grad, mass * max(t, 1.0))
    return loss.detach(), grad, teacher_grad


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("columns", [2, 3, 17, 100, 5001])
def test_loss_and_both_gradients(backend, dtype, columns):
    for scale, t in ((1, 1.0), (4, 4.0)):
        student, teacher = (
            (scale * torch.randn(4, columns)).to(dtype),
            (scale * torch.randn(4, columns)).to(dtype),
        )
        labels = torch.tensor([0, columns - 1, -100, columns // 2])
        check(student, teacher, labels, temperature=t)
        check(
            student, teacher, labels, temperature=t, label_weight=0.3, label_smoothing=0.1, weights=(2.0, 0.5)
        )


def test_options(backend):
    student, teacher = 3 * torch.randn(2, 3, 40), 3 * torch.randn(2, 3, 45).bfloat16()
    labels = torch.tensor([[0, -100, 5], [29, 7, 30 - 1]])
    weight = torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]])
    for reduction in ("mean", "sum", "none", "batchmean"):
        check(
            student, teacher, labels, temperature=torch.rand(2, 3) + 0.5, row_weight=weight, vocab_size=30,
            reduction=reduction, label_weight=0.5,
        )  # fmt: skip
    check(student, teacher, labels, vocab_size=40, standardize=True, temperature=2.0)
    check(student, teacher, labels, vocab_size=40, softcap=3.0)
    check(student, teacher, labels, vocab_size=40, num_items=4, scale_by_t2=False, temperature=2.0)


@pytest.mark.parametrize("scale", [20, 100, 1e4])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_labels_that_have_all_the_mass_or_none(backend, dtype, scale):
    student, teacher = scale * torch.randn(5, 30, dtype=dtype), scale * torch.randn(5, 30, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 3, 4])
    teacher[0, 0] = 5 * scale  # nearly one-hot, on the label
    student[1, 1] = 5 * scale
    student[2, 2] = teacher[2, 2] = 5 * scale
    student[3, 3] = -5 * scale
    student[4], teacher[4] = 0, 0
    check(student, teacher, labels, mass=8.0 * scale)


def test_masked_logits(backend):
    student, teacher = torch.randn(4, 30), torch.randn(4, 30)
    labels = torch.tensor([0, 1, 2, 3])
    student[:, 10:20] = teacher[:, 5:20] = -math.inf
    student[:, 5:10] = 0.5
    check(student, teacher, labels)
    teacher[1] = -math.inf  # a one-hot teacher: no non-target part
    teacher[1, 1] = 2.0
    check(student, teacher, labels)
    teacher[2, 2] = -math.inf  # the label has no mass
    check(student, teacher, labels)
    student[3, 3] = -math.inf
    leaf, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = decoupled_kd_loss(leaf, other, labels, reduction="none")
    grad, teacher_grad = torch.autograd.grad(loss.sum(), (leaf, other))
    assert loss.isinf().tolist() == [False, False, False, True]
    assert grad.isfinite().all()
    assert teacher_grad.isfinite().all()


def test_weights_that_make_it_the_plain_kl(backend):
    """KL = TCKD + (1 - q_y) NCKD (eq. 6 of the paper)."""
    student, teacher, label = torch.randn(1, 20), torch.randn(1, 20), torch.tensor([4])
    rest = 1 - torch.softmax(teacher, -1)[0, 4].item()
    loss = decoupled_kd_loss(student, teacher, label, target_weight=1.0, nontarget_weight=rest)
    torch.testing.assert_close(loss, kd_loss(student, teacher))


def test_gradcheck(backend):
    leaves = [torch.randn(3, 7, dtype=F64).requires_grad_() for _ in range(2)]
    labels = torch.tensor([0, 6, -100])
    for options in ({}, {"standardize": True}, {"softcap": 2.0, "label_weight": 0.5}):
        assert torch.autograd.gradcheck(
            lambda s, t, o=options: decoupled_kd_loss(s, t, labels, temperature=2.0, **o), leaves
        )


def test_statistics_and_inplace(backend):
    student, teacher, labels = torch.randn(3, 20), torch.randn(3, 20), torch.tensor([1, 2, -100])
    leaf = student.clone().requires_grad_()
    loss, stats = decoupled_kd_loss(
        leaf * 1, teacher, labels, temperature=2.0, inplace=True, return_stats=True
    )
    loss.backward()
    expected, grad, _ = check(student, teacher, labels, temperature=2.0)
    assert torch.equal(loss, expected)
    assert torch.equal(leaf.grad, grad)
    torch.testing.assert_close(
        stats.kl, kd_loss(student[:2], teacher[:2], temperature=2.0, scale_by_t2=False)
    )


def test_module(backend):
    student, teacher, labels = torch.randn(3, 20), torch.randn(3, 20), torch.tensor([1, 2, -100])
    module = DecoupledKDLoss(temperature=4.0, nontarget_weight=2.0, reduction="sum")
    expected = decoupled_kd_loss(
        student, teacher, labels, temperature=4.0, nontarget_weight=2.0, reduction="sum"
    )
    assert torch.equal(module(student, teacher, labels), expected)
    assert (
        repr(module)
        == "DecoupledKDLoss(temperature=4.0, target_weight=1.0, nontarget_weight=2.0, reduction='sum')"
    )


def test_opcheck_and_compile(one_backend):
    student, teacher, labels = torch.randn(3, 20), torch.randn(3, 20), torch.tensor([1, 2, -100])
    rows = (labels, None, None, None, [], 2.0, 0.0, 0.0, -100, False, 20, "mean", True)
    options = ("decoupled", [1.0, 8.0], False, [0.0, 0.0], True, False)
    torch.library.opcheck(torch.ops.fasttransfer.distill.default, (student, teacher, *rows, *options, True))
    leaf = student.clone().requires_grad_()
    compiled = torch.compile(decoupled_kd_loss, fullgraph=True)(leaf, teacher, labels)
    torch.testing.assert_close(compiled, decoupled_kd_loss(student, teacher, labels))
    compiled.backward()
    torch.testing.assert_close(leaf.grad, check(student, teacher, labels)[1])


def test_wrong_arguments():
    student, teacher, labels = torch.randn(3, 20), torch.randn(3, 20), torch.tensor([1, 2, -100])
    for error, words, options in (
        (ValueError, "target_weight must be at least 0", {"target_weight": -1}),
        (TypeError, "nontarget_weight must be a number", {"nontarget_weight": "8"}),
        (ValueError, "label_weight must be between 0 and 1", {"label_weight": 2.0}),
        (TypeError, "ignored_rows", {"ignored_rows": "distill"}),
    ):
        with pytest.raises(error, match=words):
            decoupled_kd_loss(student, teacher, labels, **options)
    with pytest.raises(TypeError, match="labels must be a tensor"):
        decoupled_kd_loss(student, teacher, None)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 20\)"):
        decoupled_kd_loss(student, teacher, torch.tensor([1, 20, 0]))
