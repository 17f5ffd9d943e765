"""Every divergence, standardization, softcap, the teacher's gradient and the statistics, against float64."""

from __future__ import annotations

import math

import pytest
import torch

import fasttransfer
from fasttransfer import kd_loss
from tests import distill_oracle, oracle

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "tvd": {"divergence": "tvd"},
}
AROUND = {
    "plain": {},
    "standardize": {"standardize": True},
    "softcap": {"softcap": 5.0},
    "both": {"standardize": True, "softcap": (4.0, None)},
}
LABELLED = {"label_weight": 0.4, "label_smoothing": 0.1}


def run(student, teacher, *labels, teacher_grad=True, **options):
    """(loss, student's gradient, teacher's) of the sum of the loss."""
    leaf = student.detach().requires_grad_()
    other = teacher.detach().requires_grad_(teacher_grad)
    loss = kd_loss(leaf, other, *labels, **options)
    grads = torch.autograd.grad(loss.sum(), (leaf, other) if teacher_grad else (leaf,))
    return loss.detach(), *grads


def assert_near(actual, exact, mass):
    """Norm-wise to the tolerance of the dtype; or, where a gradient is small beside the probabilities, beside them."""
    relative = oracle.TOLERANCES[actual.dtype].relative
    finite = torch.nan_to_num(exact.detach().double(), 0, 0, 0)
    rounding = 1.05 * (finite.to(actual.dtype).double() - finite).norm()
    actual, exact = actual.detach().double(), exact.detach().double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    error = torch.where(same, 0.0, actual - exact).norm()
    allowed = 2 * relative * mass + relative * finite.norm() + rounding
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def assert_loss(loss, exact, t):
    """Relatively, or to 1e-7 T^2 per row (1e-14 in fp64) where the two sides nearly agree."""
    double = loss.dtype == F64
    allowed = (1e-12 if double else 2e-6) * exact.abs() + (1e-14 if double else 1e-7) * t * t
    same = (loss == exact) | (loss.isnan() & exact.isnan())
    assert (same | ((loss.double() - exact).abs() <= allowed)).all(), f"{loss.tolist()}, {exact.tolist()}"


def check(student, teacher, *labels, **options):
    """Loss and both gradients are the oracle's; so is the loss without a gradient; the gradients' dtypes."""
    loss, grad, teacher_grad = run(student, teacher, *labels, **options)
    exact = distill_oracle.distill(student, teacher, *labels, **options)
    assert (grad.dtype, teacher_grad.dtype) == (student.dtype, teacher.dtype)
    t = options.get("temperature", 1.0)
    t = t.max().item() if isinstance(t, torch.Tensor) else t
    assert_loss(loss, exact.loss, t)
    # What one row's probabilities are multiplied by, at most: T^2 / T, and 1/deviation where standardized.
    mass = max(t, 1.0)
    if options.get("standardize"):
        mass /= min(
            x.double().masked_fill(x == -math.inf, 0).std(-1).min().item() for x in (student, teacher)
        )
    if options.get("reduction", "mean") == "mean":
        mass /= max(1, student.shape[:-1].numel()) ** 0.5
    assert_near(grad, exact.student_grad, mass)
    assert_near(teacher_grad, exact.teacher_grad, mass)
    with torch.no_grad():
        assert_loss(kd_loss(student, teacher, *labels, **options), exact.loss, t)
    return exact


@pytest.fixture(params=DIVERGENCES)
def divergence(request):
    return DIVERGENCES[request.param]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_loss_and_both_gradients(backend, divergence, around, dtype):
    for columns, scale, t in ((37, 1, 1.0), (1030, 10, 2.5)):
        student, teacher = (
            (scale * torch.randn(3, columns)).to(dtype),
            (scale * torch.randn(3, columns)).to(dtype),
        )
        check(student, teacher, temperature=t, **divergence, **AROUND[around])
    labels = torch.tensor([columns - 1, -100, 0])
    for ignored in ("skip", "distill"):
        check(
            student,
            teacher,
            labels,
            temperature=2.0,
            ignored_rows=ignored,
            **LABELLED,
            **divergence,
            **AROUND[around],
        )


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, F64), (F32, F64)], ids=str)
def test_sides_of_different_types(backend, divergence, dtypes):
    check(torch.randn(3, 300).to(dtypes[0]), torch.randn(3, 300).to(dtypes[1]), temperature=2.0, **divergence)


@pytest.mark.parametrize("columns", [2, 3, 15, 16, 17, 255, 4097, 50_001])
def test_lengths(backend, divergence, columns):
    check(3 * torch.randn(2, columns), 3 * torch.randn(2, columns), temperature=2.0, **divergence)


def test_options_of_rows(backend, divergence):
    student, teacher = torch.randn(2, 3, 40), torch.randn(2, 3, 45)
    labels = torch.tensor([[0, -100, 5], [29, 7, -100]])
    options = {
        "temperature": torch.rand(2, 3) + 0.5,
        "row_weight": torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]]),
        "vocab_size": 30,
        **LABELLED,
        **divergence,
    }
    for reduction in ("mean", "sum", "none", "batchmean"):
        check(student, teacher, labels, reduction=reduction, **options)
    check(student, teacher, labels, num_items=5, scale_by_t2=False, **options)


def test_views_are_read_in_place(backend, divergence):
    base, other = torch.randn(5, 90), torch.randn(3, 41, 2)
    check(base[::2, 3:44], other[..., 1], temperature=2.0, **divergence)
    check(base.t()[:40, :3].t(), other[:, :40, 0], **divergence)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_rows_whose_maximum_comes_late(backend, divergence, around, dtype):
    """Kernels take columns in blocks, relative to the maxima so far: rising ones, of one side and of both."""
    rise = torch.linspace(0, 30, 5000)
    student, teacher = torch.randn(4, 5000), torch.randn(4, 5000)
    student[0] += rise
    teacher[1] += rise
    student[2] += rise
    teacher[2] += rise.flip(0) * 0.5
    student[3, :2100] = teacher[3, :2100] = -math.inf
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels = torch.tensor([4999, 0, 2047, 2500])
    for t in (2.0, 2.5):
        check(student, teacher, temperature=t, **divergence, **AROUND[around])
        check(student, teacher, labels, temperature=t, label_weight=0.4, **divergence, **AROUND[around])


def test_infinite_terms_without_mass_in_the_end(backend):
    """What an early block has of +inf is nothing beside a maximum that comes later."""
    for side, name in enumerate(("forward_kl", "reverse_kl")):
        sides = torch.randn(2, 5000)
        sides[:, 4000] = 300.0
        without = sides.clone()
        sides[side, 7] = -math.inf  # the other side's mass is there, at first, and underflows
        without[:, 7] = -math.inf
        for actual, expected in zip(
            run(*sides, divergence=name), run(*without, divergence=name), strict=True
        ):
            assert actual.isfinite().all()
            torch.testing.assert_close(actual, expected)


def test_the_loss_is_the_same_without_gradients(backend, divergence):
    student, teacher = 3 * torch.randn(3, 4500), 3 * torch.randn(3, 4500)
    labels = torch.tensor([4, 2100, 4499])
    for options in ({}, {"softcap": 5.0}, {"standardize": True}):
        with_both = run(student, teacher, **divergence, **options)[0]
        assert torch.equal(with_both, run(student, teacher, teacher_grad=False, **divergence, **options)[0])
        assert torch.equal(with_both, kd_loss(student, teacher, **divergence, **options))
    for t in (2.0, 2.5):
        options = {"temperature": t, "label_weight": 0.4, **divergence}
        assert torch.equal(
            run(student, teacher, labels, **options)[0], kd_loss(student, teacher, labels, **options)
        )


def test_weights_below_zero(backend, divergence):
    student, teacher = torch.randn(3, 40).half(), torch.randn(3, 40).half()
    options = {"row_weight": torch.tensor([1.0, -2.0, 0.5]), "reduction": "sum", **divergence}
    check(student, teacher, **options)
    check(student, teacher, torch.tensor([3, 4, 5]), **LABELLED, **options)


@pytest.mark.parametrize("scale", [100, 1e4])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_large_logits_are_finite_and_right(backend, divergence, scale, dtype):
    """Probabilities underflow on both sides."""
    student, teacher = (scale * torch.randn(4, 500)).to(dtype), (scale * torch.randn(4, 500)).to(dtype)
    student[2], teacher[3] = 0, 0
    exact = check(student, teacher, **divergence)
    assert exact.loss.isfinite()
    check(student, student.clone(), **divergence)


def test_masked_vocabulary(backend, divergence):
    student, teacher = torch.randn(4, 60), torch.randn(4, 60)
    student[:, 10:30] = teacher[:, 10:30] = -math.inf  # on both sides: nothing
    check(student, teacher, temperature=2.0, **divergence)
    check(student, teacher, softcap=3.0, **divergence)
    check(student, teacher, standardize=True, **divergence)
    one_sided = {"forward_kl": teacher, "reverse_kl": student}.get(divergence.get("divergence", "forward_kl"))
    if one_sided is not None:  # the side whose mass pays
        one_sided[:, 40:50] = -math.inf
    else:
        student[:, 40:50], teacher[:, 50:] = -math.inf, -math.inf
    check(student, teacher, temperature=2.0, **divergence)


@pytest.mark.parametrize("name, infinite", [("forward_kl", 0), ("reverse_kl", 1)])
def test_mass_on_a_masked_logit_is_infinite_with_finite_gradients(backend, name, infinite):
    student, teacher = torch.randn(3, 40), torch.randn(3, 40)
    (student, teacher)[infinite][1, 7] = -math.inf
    loss, grad, teacher_grad = run(student, teacher, divergence=name, reduction="none")
    assert loss.isinf().tolist() == [False, True, False]
    assert grad.isfinite().all()
    assert teacher_grad.isfinite().all()
    for i in (0, 2):
        exact = distill_oracle.distill(student[i], teacher[i], divergence=name)
        assert_near(grad[i], exact.student_grad, 1.0)
        assert_near(teacher_grad[i], exact.teacher_grad, 1.0)
    if name == "reverse_kl":
        assert not grad[1].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("around", AROUND)
def test_what_is_no_logit_makes_its_row_nan(backend, divergence, side, value, around):
    sides = torch.randn(3, 40), torch.randn(3, 40)
    sides[side][1, 9] = value
    loss, grad, teacher_grad = run(*sides, reduction="none", **divergence, **AROUND[around])
    for tensor in (loss, grad, teacher_grad):
        assert tensor[1].isnan().all()
        assert tensor[[0, 2]].isfinite().all()
    sides[side][1] = -math.inf
    assert run(*sides, reduction="none", **divergence, **AROUND[around])[0][1].isnan()


def test_rows_that_are_not_counted_are_not_read(backend, divergence):
    student, teacher = torch.randn(3, 40), torch.randn(3, 40)
    labels = torch.tensor([1, -100, 2])
    student[1], teacher[1] = math.nan, math.nan
    loss, grad, teacher_grad = run(student, teacher, labels, label_weight=0.0, **divergence)
    assert loss.isfinite()
    assert not grad[1].any()
    assert not teacher_grad[1].any()
    nothing = run(student, teacher, torch.full((3,), -100), label_weight=0.5, **divergence)
    assert not any(x.any() for x in nothing)


def test_ends_of_jsd_are_the_two_kl():
    student, teacher = torch.randn(3, 40), torch.randn(3, 40)
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        ours = run(student, teacher, divergence="jsd", jsd_beta=beta, temperature=2.0)
        same = run(student, teacher, divergence=name, temperature=2.0)
        for a, b in zip(ours, same, strict=True):
            assert torch.equal(a, b)


def test_gradient_of_the_teacher_alone(backend, divergence):
    student, teacher = torch.randn(3, 40), torch.randn(3, 40).requires_grad_()
    loss = kd_loss(student, teacher, temperature=2.0, **divergence)
    (grad,) = torch.autograd.grad(loss, teacher)
    exact = distill_oracle.distill(student, teacher, temperature=2.0, **divergence)
    assert_near(grad, exact.teacher_grad, 1.0)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_inplace(backend, divergence, dtype):
    student, teacher = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype)
    for options in ({"softcap": 4.0, **divergence}, {"standardize": True, **divergence}):
        loss, grad, teacher_grad = run(student, teacher, **options)
        leaf, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        logits = leaf * 1
        same = kd_loss(logits, other, inplace=True, **options)
        same.backward()
        assert torch.equal(same, loss)
        assert torch.equal(leaf.grad, grad)
        assert torch.equal(other.grad, teacher_grad)


@pytest.mark.parametrize("around", AROUND)
def test_statistics(backend, divergence, around):
    student, teacher = 3 * torch.randn(2, 3, 50), 3 * torch.randn(2, 3, 50)
    teacher[0, 1] = student[0, 1]
    labels = torch.tensor([[0, -100, 5], [49, 7, 8]])
    weight = torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]])
    options = {"temperature": 2.0, "label_weight": 0.5, "row_weight": weight, **divergence, **AROUND[around]}
    for ignored in ("skip", "distill"):
        options["ignored_rows"] = ignored
        exact = distill_oracle.distill(student, teacher, labels, **options)
        leaf = student.clone().requires_grad_()
        loss, stats = kd_loss(leaf, teacher, labels, return_stats=True, **options)
        assert not any(x.requires_grad for x in stats)
        oracle.assert_norm_close(loss, exact.loss)
        assert torch.equal(stats.loss, loss)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert_near(grad, exact.student_grad, 2.0)
        w = weight.flatten().double()
        labelled = torch.where(labels.flatten() != -100, w, 0.0)
        counted = labelled if ignored == "skip" else w
        for i, value in enumerate(stats[1:]):
            by = labelled if i == 1 else counted
            expected = (by * exact.stats[:, i]).sum() / by.sum()
            assert abs(value.item() - expected.item()) <= 3e-6 * (1 + abs(expected.item()))
        _, stats = kd_loss(student, teacher, labels, reduction="none", return_stats=True, **options)
        for value, column in zip(stats[1:], exact.stats.unbind(-1), strict=True):
            assert (value.flatten().double() - column).abs().max() <= 3e-6 * (1 + column.abs().max())


def test_agreement_takes_the_first_of_equals(backend):
    student, teacher = torch.zeros(4, 20), torch.zeros(4, 20)
    student[0, 5] = teacher[0, 7] = 1  # neither
    student[1, [3, 9]] = teacher[1, [3, 12]] = 1  # the first of two
    student[2, [3, 9]] = teacher[2, 9] = 1  # not the first
    _, stats = kd_loss(student, teacher, reduction="none", return_stats=True)
    assert stats.agreement.tolist() == [0, 1, 0, 1]
    assert stats.kl[3] == 0


def test_constant_rows_have_no_deviation(backend):
    """Their standardized logits are 0; the derivative of the deviation is taken as 0."""
    student, teacher = torch.full((2, 30), 3.0), torch.randn(2, 30)
    loss, grad, _ = run(student, teacher, standardize=True)
    oracle.assert_norm_close(loss, distill_oracle.distill(torch.zeros(2, 30), teacher, standardize=True).loss)
    assert grad.isfinite().all()


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_an_offset_of_the_logits_costs_standardize_no_digits(backend, divergence, offset):
    check(torch.randn(3, 700) + offset, torch.randn(3, 700) + offset, standardize=True, **divergence)


def test_empty(backend, divergence):
    loss, grad, teacher_grad = run(torch.zeros(0, 5), torch.zeros(0, 5), **divergence, softcap=2.0)
    assert loss == 0
    assert grad.shape == teacher_grad.shape == (0, 5)


@pytest.mark.parametrize("around", AROUND)
def test_gradcheck(backend, divergence, around):
    student, teacher = torch.randn(2, 9, dtype=F64), torch.randn(2, 9, dtype=F64)
    labels = torch.tensor([1, 7])
    leaves = [x.requires_grad_() for x in (student, teacher)]
    options = {"temperature": 2.0, "label_weight": 0.3, **divergence, **AROUND[around]}
    assert torch.autograd.gradcheck(lambda s, t: kd_loss(s, t, labels, **options), leaves)


def test_fp16_gradients_do_not_underflow(backend, divergence):
    """Mean over many rows of a large vocabulary: applied before rounding, the loss scale brings them back."""
    student, teacher = torch.randn(64, 3000).half(), torch.randn(64, 3000).half()
    leaf, other = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    (kd_loss(leaf, other, num_items=8192, softcap=20.0, **divergence) * 65536.0).backward()
    exact = distill_oracle.distill(student, teacher, num_items=8192, softcap=20.0, **divergence)
    oracle.assert_norm_close(leaf.grad, exact.student_grad * 65536)
    oracle.assert_norm_close(other.grad, exact.teacher_grad * 65536)


def test_second_backward_is_not_scaled_twice(backend, divergence):
    student, teacher = torch.randn(3, 40).requires_grad_(), torch.randn(3, 40).requires_grad_()
    loss = 3 * kd_loss(student, teacher, softcap=4.0, **divergence)
    first = [g.clone() for g in torch.autograd.grad(loss, (student, teacher), retain_graph=True)]
    second = torch.autograd.grad(loss, (student, teacher))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    loss = kd_loss(student, teacher, softcap=4.0, **divergence)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("want_stats", [False, True])
def test_opcheck(one_backend, divergence, want_stats):
    student, teacher = torch.randn(3, 40), torch.randn(3, 40)
    name = divergence.get("divergence", "forward_kl")
    rows = (None, None, None, None, [], 2.0, 0.0, 0.0, -100, False, 40, "mean", True)
    options = (name, [0.3] if name == "jsd" else [], True, [4.0, 0.0], True, want_stats)
    torch.library.opcheck(torch.ops.fasttransfer.distill.default, (student, teacher, *rows, *options, True))
    torch.library.opcheck(torch.ops.fasttransfer.distill_.default, (student, teacher, *rows, *options))


def test_compile(one_backend, divergence):
    student, teacher = torch.randn(3, 40).requires_grad_(), torch.randn(3, 40).requires_grad_()

    def both(s, t):
        loss, stats = kd_loss(s, t, temperature=2.0, softcap=4.0, return_stats=True, **divergence)
        return loss, stats.kl

    eager, compiled = both(student, teacher), torch.compile(both, fullgraph=True)(student, teacher)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(loss, (student, teacher)) for loss, _ in (eager, compiled)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "error, words, options",
    [
        (ValueError, "divergence must be one of .*'reverse_kl'.*got 'kl'", {"divergence": "kl"}),
        (ValueError, "jsd_beta must be between 0 and 1, got 2", {"divergence": "jsd", "jsd_beta": 2}),
        (ValueError, "jsd_beta=0.3 was given for divergence='tvd'", {"divergence": "tvd", "jsd_beta": 0.3}),
        (TypeError, "standardize must be True or False", {"standardize": 1}),
        (ValueError, "softcap must be greater than 0", {"softcap": 0.0}),
        (TypeError, "softcap must be a number", {"softcap": "30"}),
        (ValueError, "softcap must be a number, None or a pair .* got 3", {"softcap": (1, 2, 3)}),
        (TypeError, "return_stats must be True or False", {"return_stats": None}),
    ],
)
def test_wrong_options(error, words, options):
    with pytest.raises(error, match=words):
        kd_loss(torch.randn(2, 5), torch.randn(2, 5), **options)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_standardized_rows_of_infinite_loss_have_finite_gradients(backend, name):
    student, teacher = torch.randn(2, 30), torch.randn(2, 30)
    (student if name == "forward_kl" else teacher)[0, 4] = -math.inf
    loss, grad, teacher_grad = run(student, teacher, divergence=name, standardize=True, reduction="none")
    assert loss.isinf().tolist() == [True, False]
    assert grad.isfinite().all()
    assert teacher_grad.isfinite().all()


def test_a_count_of_nothing_is_a_divisor(backend, divergence):
    """What gradient accumulation gives for a batch without labels."""
    student, teacher, labels = torch.randn(3, 9), torch.randn(3, 9), torch.full((3,), -100)
    items = (labels != -100).sum()
    loss, grad, _ = run(student, teacher, labels, label_weight=0.1, num_items=items, **divergence)
    assert loss == 0
    assert not grad.any()


def test_temperatures_that_nobody_saw_make_their_rows_nan():
    """Under torch.compile values are not checked: the native ops are what sees them."""
    if not fasttransfer.build_info()["cpu_kernels"]:
        pytest.skip("no native CPU kernels")
    ops = torch.ops.fasttransfer
    t, labels = torch.tensor([1.0, -1.0, 0.0, math.nan]), torch.tensor([0, 1, 2, 3])
    for dtype in (F32, F16, BF16, F64):
        student, teacher = torch.randn(4, 90).to(dtype), torch.randn(4, 90).to(dtype)
        for given, share in ((None, 0.0), (labels, 0.3)):
            rows = (given, None, t, None, [], 1.0, share, 0.0, -100, False, 90, "none", True)
            results = [ops.kd(student, teacher, *rows, True)]
            for name, args in (("forward_kl", []), ("reverse_kl", []), ("jsd", [0.3]), ("tvd", [])):
                for around in ((False, [5.0, 5.0]), (True, [0.0, 0.0])):
                    results.append(
                        ops.distill(student, teacher, *rows, name, args, *around, False, True, True)
                    )
            values, indices = teacher.float().log_softmax(-1).topk(4)
            results.append(ops.topk_kd(student, values, indices, *rows, "renormalize", True))
            for loss, grad, *_ in results:
                assert loss[0].isfinite()
                assert grad[0].isfinite().all()
                assert loss[1:].isnan().all()
                assert grad[1:].isnan().all()
