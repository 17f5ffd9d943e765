"""feature_kd_loss against float64 formulas written out row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttransfer import ConvMap, FeatureKDLoss, LinearMap, feature_kd_loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def row_loss(r, u, loss):
    """One row, float64."""
    if loss == "mse":
        return ((r - u) ** 2).sum() / len(r)
    return 1 - (r @ u) / (r.norm() * u.norm())


def oracle(r, u, loss, weight=None, reduction="mean", num_items=None):
    """Of [..., D]; the gradients are autograd's."""
    r, u = r.detach().double().requires_grad_(), u.detach().double().requires_grad_()
    rows = [row_loss(a, b, loss) for a, b in zip(r.flatten(0, -2), u.flatten(0, -2), strict=True)]
    weights = [1.0] * len(rows) if weight is None else weight.double().flatten().tolist()
    rows = torch.stack(
        [w * x if w else torch.zeros((), dtype=F64) for w, x in zip(weights, rows, strict=True)]
    )
    total = {
        "none": rows.reshape(r.shape[:-1]),
        "sum": rows.sum(),
        "batchmean": rows.sum() / (num_items or len(r)),
        "mean": rows.sum() / (num_items or sum(weights) or 1),
    }[reduction]
    return total.detach(), *torch.autograd.grad(total.sum(), (r, u))


def check(r, u, loss, tolerance=2e-6, **options):
    leaf, other = r.detach().requires_grad_(), u.detach().requires_grad_()
    actual = feature_kd_loss(leaf, other, loss=loss, **options)
    grads = torch.autograd.grad(actual.sum(), (leaf, other))
    options["weight"] = options.pop("row_weight", None)
    expected, *exact = oracle(r, u, loss, **options)
    assert actual.dtype == (F64 if F64 in (r.dtype, u.dtype) else F32)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * 1e-1)
    for grad, e, x in zip(grads, exact, (r, u), strict=True):
        assert grad.dtype == x.dtype
        rounding = {BF16: 2**-8, F16: 2**-11}.get(x.dtype, tolerance)
        assert (grad.double() - e).norm() <= rounding * e.norm() + 1e-6 * (x.dtype == F16)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (BF16, F32), (F32, F64)]
)
def test_values_and_gradients(loss, dtypes):
    tolerance = 1e-12 if dtypes == (F64, F64) else 2e-6
    for size in ((5, 1), (4, 7), (2, 3, 64), (3, 2000)):
        if loss == "cosine" and size[-1] == 1:
            continue  # 0 or 2 and no gradient but rounding
        check(torch.randn(size).to(dtypes[0]), torch.randn(size).to(dtypes[1]), loss, tolerance)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_weights_and_reductions(loss):
    r, u = torch.randn(2, 3, 10), torch.randn(2, 3, 10)
    weight = torch.tensor([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]])
    for reduction in ("mean", "batchmean", "sum", "none"):
        check(r, u, loss, reduction=reduction)
        check(r, u, loss, reduction=reduction, row_weight=weight)
        check(r, u, loss, reduction=reduction, row_weight=weight > 0.7)
    check(r, u, loss, num_items=7.0, row_weight=weight)
    check(r, u, loss, num_items=7.0, reduction="batchmean")
    seven = feature_kd_loss(r, u, loss=loss, num_items=torch.tensor(7))
    torch.testing.assert_close(seven, feature_kd_loss(r, u, loss=loss, num_items=7))


def test_rows_that_do_not_count_are_not_used():
    r, u = torch.randn(3, 4), torch.randn(3, 4)
    r[1], u[1, 0] = math.nan, math.inf
    mask = torch.tensor([True, False, True])
    for loss in ("mse", "cosine"):
        leaf = r.clone().requires_grad_()
        value = feature_kd_loss(leaf, u, loss=loss, row_weight=mask)
        value.backward()
        torch.testing.assert_close(value, feature_kd_loss(r[mask], u[mask], loss=loss))
        assert leaf.grad[1].eq(0).all()
        assert feature_kd_loss(r, u, loss=loss).isnan()
        leaf.grad = None
        nothing = feature_kd_loss(leaf, u, loss=loss, row_weight=torch.zeros(3))
        nothing.backward()
        assert nothing == 0
        assert leaf.grad.eq(0).all()
        empty = torch.zeros(0, 4, requires_grad=True)
        feature_kd_loss(empty, torch.zeros(0, 4), loss=loss).backward()
        assert feature_kd_loss(empty, torch.zeros(0, 4), loss=loss) == 0


def test_conventions():
    """MSE is F.mse_loss, FitNets' eq. 3 is D/2 times the sum, cosine is CosineEmbeddingLoss with target 1."""
    r, u = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(feature_kd_loss(r, u), F.mse_loss(r, u))
    hint = sum(0.5 * (a - b).norm() ** 2 for a, b in zip(u, r, strict=True))
    torch.testing.assert_close(5 / 2 * feature_kd_loss(r, u, reduction="sum"), hint)
    torch.testing.assert_close(
        feature_kd_loss(r, u, loss="cosine"), F.cosine_embedding_loss(r, u, torch.ones(6))
    )


def test_feature_maps():
    """[N, C, H, W]: a row is a position, its features the channels, after ConvMap without being told."""
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    carry = ConvMap(3, 6, 3)
    r, u = carry(student).permute(0, 2, 3, 1), teacher.permute(0, 2, 3, 1)
    weight = torch.rand(2, 4, 5)
    for options in ({}, {"loss": "cosine"}, {"loss": "cosine", "row_weight": weight, "reduction": "none"}):
        expected = feature_kd_loss(r, u, **options)
        torch.testing.assert_close(feature_kd_loss(student, teacher, transform=carry, **options), expected)
        torch.testing.assert_close(
            feature_kd_loss(student, teacher, transform=nn.Sequential(carry), dim=1, **options), expected
        )


def test_transform_learns_and_fits():
    """The map goes from the student's width to the teacher's; fitted, it is at the minimum of the mean loss."""
    student, teacher = torch.randn(50, 4, dtype=F64), torch.randn(50, 7, dtype=F64)
    criterion = FeatureKDLoss(LinearMap(4, 7, dtype=F64))
    before = criterion(student, teacher)
    before.backward()
    assert all(p.grad.norm() > 0 for p in criterion.parameters())
    criterion.zero_grad()
    criterion.transform.fit(student, teacher)
    after = criterion(student, teacher)
    after.backward()
    assert after < before
    for p in criterion.parameters():
        assert p.grad.norm() < 1e-12


@pytest.mark.parametrize("zero", ["student", "teacher", "both"])
def test_cosine_without_a_direction(zero):
    r, u = torch.randn(3, 8), torch.randn(3, 8)
    if zero != "teacher":
        r[1] = 0
    if zero != "student":
        u[1] = 0
    leaf, other = r.clone().requires_grad_(), u.clone().requires_grad_()
    rows = feature_kd_loss(leaf, other, loss="cosine", reduction="none")
    grads = torch.autograd.grad(rows.sum(), (leaf, other))
    assert rows[1] == 1
    for grad in grads:
        assert grad[1].eq(0).all()
        assert grad.isfinite().all()
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(rows[keep], oracle(r[keep], u[keep], "cosine", reduction="none")[0].float())


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_cosine_of_any_size(size):
    r, u = torch.randn(3, 8), torch.randn(3, 8)
    leaf = (r * size).requires_grad_()
    loss = feature_kd_loss(leaf, u / size, loss="cosine")
    loss.backward()
    expected, grad, _ = oracle(r, u, "cosine")
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(leaf.grad.double() * size, grad, rtol=1e-5, atol=1e-7)


def test_cosine_where_both_agree():
    """1 - cos has no digits left at an angle of 1e-4; the directions' distance has."""
    r = torch.randn(4, 100)
    u = 3 * (r + 1e-4 * torch.randn(4, 100))
    expected, *_ = oracle(r, u, "cosine")
    torch.testing.assert_close(feature_kd_loss(r, u, loss="cosine").double(), expected, rtol=1e-3, atol=0)
    assert feature_kd_loss(r, r, loss="cosine") == 0


def test_16_bit_features_are_summed_in_32():
    r = torch.full((1, 4096), 1.0, dtype=BF16)
    u = torch.zeros(1, 4096, dtype=F16)
    u[0, :5] = 300.0  # whose square fp16 does not hold
    exact = (4091 + 5 * 299.0**2) / 4096
    assert feature_kd_loss(r, u).item() == pytest.approx(exact, rel=1e-6)


def test_teacher_gets_a_gradient_only_where_it_asks():
    r, u = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    feature_kd_loss(r, u).backward()
    assert u.grad is None
    u.requires_grad_()
    feature_kd_loss(r, u).backward()
    assert u.grad is not None


def test_gradcheck_compile_and_autocast():
    leaves = [torch.randn(3, 5, dtype=F64, requires_grad=True) for _ in range(2)]
    weight = torch.tensor([1.0, 0.0, 2.0])
    for loss in ("mse", "cosine"):
        assert torch.autograd.gradcheck(
            lambda r, u, loss=loss: feature_kd_loss(r, u, loss=loss, row_weight=weight), leaves
        )
        criterion = FeatureKDLoss(LinearMap(5, 6), loss=loss)
        r, u = torch.randn(3, 5), torch.randn(3, 6)
        compiled = torch.compile(criterion, fullgraph=True)(r, u, row_weight=weight)
        torch.testing.assert_close(compiled, criterion(r, u, row_weight=weight))
        with torch.autocast("cpu", torch.bfloat16):
            low = criterion(r, u)
        assert low.dtype == F32
        torch.testing.assert_close(low, criterion(r, u), rtol=0.05, atol=0.01)


def test_module():
    criterion = FeatureKDLoss(LinearMap(3, 4), loss="cosine", reduction="sum")
    assert {name for name, _ in criterion.named_parameters()} == {"transform.weight", "transform.bias"}
    r, u = torch.randn(2, 3), torch.randn(2, 4)
    expected = feature_kd_loss(r, u, transform=criterion.transform, loss="cosine", reduction="sum")
    assert torch.equal(criterion(r, u), expected)
    assert "loss='cosine', dim=None, reduction='sum'" in repr(criterion)
    assert torch.equal(FeatureKDLoss(torch.relu)(r, r.relu()), torch.zeros(()))


def test_wrong_arguments():
    r, u = torch.randn(2, 3), torch.randn(2, 4)
    for error, words, args, options in (
        (TypeError, "student_features must be a tensor, got list", ([1.0], u), {}),
        (TypeError, "teacher_features must be float32", (r, u.long()), {}),
        (ValueError, r"same shape, got \[2, 3\] and \[2, 4\]; a LinearMap", (r, u), {}),
        (ValueError, r"\[2, 5\] and \[2, 4\] \(of student_features \[2, 3\]\)", (r, u), {"transform": nn.Linear(3, 5)}),
        (TypeError, "transform must be a module or function", (r, r), {"transform": 3}),
        (TypeError, "the transformed student_features must be a tensor", (r, r), {"transform": lambda x: (x,)}),
        (ValueError, "loss must be one of 'mse', 'cosine', got 'l1'", (r, r), {"loss": "l1"}),
        (ValueError, "reduction must be one of", (r, r), {"reduction": "avg"}),
        (TypeError, "dim must be an integer", (r, r), {"dim": 1.0}),
        (ValueError, r"dim must be a dimension of the features \[2, 3\], got 2", (r, r), {"dim": 2}),
        (ValueError, r"row_weight must have a weight per row of the features, \[2\]", (r, r), {"row_weight": r}),
        (TypeError, "row_weight must be a tensor", (r, r), {"row_weight": [1, 1]}),
        (ValueError, "row_weight requires grad", (r, r), {"row_weight": torch.ones(2, requires_grad=True)}),
        (ValueError, "num_items replaces a divisor", (r, r), {"reduction": "sum", "num_items": 2}),
        (ValueError, "num_items must be greater than 0", (r, r), {"num_items": 0}),
        (ValueError, "at least one number per row", (r[:, :0], r[:, :0]), {}),
        (ValueError, "'batchmean' needs features with a first dimension", (r[0], r[0]), {"reduction": "batchmean"}),
        (ValueError, "teacher_features is on meta", (r, r.to("meta")), {}),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            feature_kd_loss(*args, **options)
    with pytest.raises(TypeError, match="transform must be"):
        FeatureKDLoss("linear")
    with pytest.raises(ValueError, match="loss must be one of"):
        FeatureKDLoss(loss="l1")
