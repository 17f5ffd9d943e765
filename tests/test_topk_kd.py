"""topk_kd_loss: the loss and the gradient against float64, on every backend."""

import math

import pytest
import torch

from fasttransfer import kd_loss, topk_kd_loss
from tests import oracle
from tests.kd_calls import kd_and_grad
from tests.topk_calls import check_topk, topk_and_grad, topk_row

INF, NAN = math.inf, math.nan
TAILS = ("renormalize", "zero", "bucket")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def name_of(value):
    return str(value).removeprefix("torch.")


def teacher(rows, columns, k, dtype=F32, index=torch.int64):
    """Log-probabilities and indices of a random teacher."""
    values, indices = (3 * torch.randn(rows, columns, dtype=F64)).log_softmax(-1).topk(k)
    return values.to(dtype), indices.to(index)


def student(rows, columns, dtype=F32):
    return (3 * torch.randn(rows, columns)).to(dtype)


def check_row(logits, values, indices, tail, dtype=F32):
    """One row, written out."""
    s = torch.tensor([logits], dtype=dtype)
    return check_topk(
        s,
        torch.tensor([values]),
        torch.tensor([indices]),
        tail=tail,
        teacher_form="log_probs",
        reduction="none",
    )


# The widths change the path: less than a vector, a part of one at the end, more than one block of 2048.
@pytest.mark.parametrize("columns, k", [(2, 1), (7, 3), (33, 32), (257, 16), (2049, 5), (5003, 300)])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=name_of)
def test_against_float64(backend, dtype, tail, columns, k):
    s = student(3, columns, dtype)
    for values_dtype in (dtype, F32):
        values, indices = teacher(3, columns, k, values_dtype, torch.int32)
        labels = torch.tensor([columns - 1, -100, int(indices[2, 0])])  # the last one is among the indices
        for temperature in (1.0, 2.0, 3.7) if tail == "renormalize" else (1.0,):
            options = {"tail": tail, "teacher_form": "log_probs", "temperature": temperature}
            check_topk(s, values, indices, **options)
            check_topk(s, values, indices, labels, label_weight=0.3, label_smoothing=0.1, **options)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=name_of)
def test_options_are_those_of_kd_loss(backend, dtype):
    s, (values, indices) = student(12, 40, dtype).reshape(3, 4, 40), teacher(12, 36, 5)
    values, indices = values.reshape(3, 4, 5), indices.reshape(3, 4, 5)
    labels = torch.randint(36, (3, 4))
    labels[0, :2] = -100
    weight, temperature = torch.rand(3, 4), 0.5 + 3 * torch.rand(3, 4)
    weight[1, 1] = 0
    plain = {"vocab_size": 36, "row_weight": weight}
    check_topk(s, values, indices, temperature=temperature, **plain)
    check_topk(s, values, indices, reduction="none", scale_by_t2=False, temperature=2.0, **plain)
    labelled = plain | {"label_weight": 0.4, "ignored_rows": "distill", "temperature": 2.0}
    check_topk(s, values, indices, labels, **labelled)
    check_topk(s, values, indices, labels, num_items=(7.0, 3.0), **labelled)
    check_topk(s, values, indices, labels, label_weight=1.0, reduction="batchmean")  # the teacher is not read
    check_topk(
        s, values, indices, labels, label_weight=0.0, reduction="sum", teacher_form="log_probs", tail="bucket"
    )


@pytest.mark.parametrize("columns", [5, 2100])
def test_all_columns_are_kd_loss(backend, columns):
    """k = V in any order: a KL between softmaxes, whatever becomes of a tail that is not there."""
    s, t = student(4, columns), 3 * torch.randn(4, columns)
    indices = torch.stack([torch.randperm(columns) for _ in range(4)])
    log_probs = t.double().log_softmax(-1).gather(-1, indices).float()
    exact, exact_grad = kd_and_grad(s, t, temperature=2.0)
    loss, grad = topk_and_grad(s, t.gather(-1, indices), indices, temperature=2.0)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-7)
    exact, exact_grad = kd_and_grad(s, t)
    for tail in ("zero", "bucket"):
        loss, grad = topk_and_grad(s, log_probs, indices, tail=tail, teacher_form="log_probs")
        torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-5, atol=1e-7)


def test_the_bucket_is_at_most_the_whole_divergence(backend):
    """Outcomes that are merged can only lose information; with more of them apart the loss rises to the whole."""
    s, t = student(6, 50, F64), 3 * torch.randn(6, 50, dtype=F64)
    log_probs, whole = t.log_softmax(-1), kd_loss(s, t)
    losses = []
    for k in (1, 5, 20, 49):
        values, indices = log_probs.topk(k)
        losses.append(topk_kd_loss(s, values, indices, teacher_form="log_probs", tail="bucket"))
    assert 0 <= losses[0] <= losses[1] <= losses[2] <= losses[3] <= whole
    torch.testing.assert_close(losses[3], whole)  # one outcome in the bucket is the outcome itself


def test_both_forms_agree_where_the_teacher_is_renormalized(backend):
    s, t = student(3, 30), 3 * torch.randn(3, 30)
    values, indices = t.topk(4)
    log_probs = t.log_softmax(-1).gather(-1, indices)
    loss, grad = topk_and_grad(s, values, indices, temperature=3.0)
    other, other_grad = topk_and_grad(s, log_probs, indices, temperature=3.0, teacher_form="log_probs")
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(grad, other_grad)


@pytest.mark.parametrize("tail", TAILS)
def test_padding_and_repeated_indices(backend, tail):
    """Index -1 or value -inf: no entry. An index that was there before: neither; its value does not matter."""
    s = student(1, 9)
    plain = check_topk(
        s, torch.tensor([[-1.0, -2.0]]), torch.tensor([[4, 7]]), tail=tail, teacher_form="log_probs"
    )
    for values, indices in [
        ([-1.0, NAN, -2.0], [4, -1, 7]),
        ([0.0, -1.0, -2.0], [-1, 4, 7]),
        ([-1.0, -INF, -2.0], [4, 2, 7]),
        ([-1.0, -2.0, -2.0], [4, 7, 7]),
        ([-1.0, NAN, -2.0, -0.5], [4, 4, 7, 7]),
        ([-INF, -1.0, -2.0], [4, 4, 7]),  # what does not exist does not stand in the way
    ]:
        padded = check_topk(
            s, torch.tensor([values]), torch.tensor([indices]), tail=tail, teacher_form="log_probs"
        )
        for got, expected in zip(padded, plain, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_a_row_without_entries(backend):
    """Nothing to normalise: NaN. No mass: 0. One bucket with everything: 0, on both sides."""
    s, values, indices = student(2, 9), torch.zeros(2, 3), torch.full((2, 3), -1)
    for tail, expected in (("renormalize", NAN), ("zero", 0.0), ("bucket", 0.0)):
        loss, grad = topk_and_grad(s, values, indices, tail=tail, teacher_form="log_probs")
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True, atol=1e-6, rtol=0)
        torch.testing.assert_close(grad, torch.full_like(s, expected), equal_nan=True, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("k", [1, 3])
def test_extremes(backend, tail, k):
    """Logits of +-1e4, a one-hot teacher, student logits of -inf where the teacher has no mass."""
    s = torch.randn(4, 300)
    s[0] *= 1e4
    s[1, ::2] = -1e4
    s[2, 7:] = -INF
    s[3, :] = 1e4
    values, indices = torch.full((4, k), -INF), torch.arange(k).repeat(4, 1)
    values[:, 0] = 0.0
    check_topk(s, values, indices, tail=tail, teacher_form="log_probs", reduction="none")
    values, indices = teacher(4, 6, k)
    values[2] -= values[2].logsumexp(-1)  # no mass outside, where the student has none
    check_topk(s, values, indices, tail=tail if tail != "bucket" else "zero", teacher_form="log_probs")


@pytest.mark.parametrize("gap", [10.0, 50.0, 300.0, 2e4])
@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
def test_a_tiny_tail_is_exact(backend, dtype, gap):
    """p_rest = e^-gap and less: 1 - sum of p would be 0. The heads are far above, then in, then before the tail."""
    tail = torch.randn(2100, dtype=F64) - gap
    for heads in ([0, 1, 2], [2090, 5, 700], [2099]):
        logits = tail.clone()
        logits[heads] = torch.tensor([1.0, 0.5, 0.0], dtype=F64)[: len(heads)]
        values = torch.log(torch.tensor([0.5, 0.3, 0.1], dtype=dtype))[: len(heads)]
        s = logits.to(dtype)[None]
        loss, _ = check_topk(
            s, values[None], torch.tensor([heads]), tail="bucket", teacher_form="log_probs", reduction="none"
        )
        assert gap < 50 or loss > gap / 20


def test_student_logits_of_minus_infinity(backend):
    """In K: infinite with mass, free without. A tail of -inf: the same. Gradients are finite."""
    for tail in TAILS:
        loss, grad = check_row([0.0, -INF, 1.0, 2.0], [-1.0, -2.0], [1, 2], tail)
        assert loss.isinf()
        assert grad.isfinite().all()
        loss, _ = check_row([0.0, -INF, 1.0, 2.0], [-1.0, -2000.0], [2, 1], tail)
        assert loss.isfinite()
    loss, grad = check_row([0.0, -INF, 1.0, -INF], [-1.0, -2.0], [0, 2], "bucket")
    assert loss.isinf()
    assert grad.isfinite().all()
    loss, _ = check_row([0.0, -INF, 1.0, -INF], [-1.0, -2.0], [0, 2], "zero")
    assert loss.isfinite()
    check_row([-INF] * 64 + [0.0, 1.0, 2.0], [-1.0], [64], "bucket")
    check_row([-200.0] * 64 + [0.0, 1.0, 2.0], [-1.0, -2.0, -3.0], [64, 66, 65], "bucket")


@pytest.mark.parametrize("tail", TAILS)
def test_what_makes_a_row_nan_makes_no_other(backend, tail):
    s, (values, indices) = student(6, 70), teacher(6, 70, 4)
    s[0, 69] = NAN  # outside of K or in it, both below
    s[1, 3] = INF
    s[2] = -INF
    values[3, 1] = NAN
    values[4, 2] = -NAN
    indices[0], indices[1] = torch.tensor([69, 3, 4, 5]), torch.tensor([1, 2, 4, 5])
    loss, grad = check_topk(s, values, indices, tail=tail, teacher_form="log_probs", reduction="none")
    assert loss.isnan().tolist() == [True] * 5 + [False]
    assert grad.isnan().all(-1).tolist() == [True] * 5 + [False]
    s[0, [68, 69]] = torch.tensor([NAN, 0.0])
    s[1] = 0.0
    s[1, 1] = INF
    loss, _ = topk_and_grad(s, values, indices, tail=tail, teacher_form="log_probs", reduction="none")
    assert loss.isnan()[:2].all()


def test_rows_that_do_not_count_are_not_read(backend):
    s, (values, indices) = student(4, 20), teacher(4, 20, 3)
    labels, weight = torch.tensor([3, -100, 5, 6]), torch.tensor([1.0, 1.0, 0.0, 2.0])
    exact = check_topk(s, values, indices, labels, label_weight=0.5, row_weight=weight)
    s[1:3], values[1:3], indices[1:3] = NAN, NAN, 1000
    loss, grad = topk_and_grad(s, values, indices, labels, label_weight=0.5, row_weight=weight)
    torch.testing.assert_close(loss, exact[0])
    torch.testing.assert_close(grad, exact[1])
    assert not grad[1:3].any()


def test_index_out_of_range_in_the_kernel(backend):
    """Where nobody has looked at the values (a device without FASTTRANSFER_CHECK), the row is NaN."""
    s, (values, indices) = student(3, 20), teacher(3, 20, 3)
    indices[0, 1], indices[1, 0] = 20, -2
    for tail in TAILS:
        tail_of_options = (
            None,
            None,
            None,
            None,
            [],
            1.0,
            0.0,
            0.0,
            -100,
            False,
            20,
            "none",
            True,
            tail,
            True,
        )
        loss, grad, _ = torch.ops.fasttransfer.topk_kd(s, values, indices, *tail_of_options)
        assert loss.isnan().tolist() == [True, True, False]
        assert grad.isnan().all(-1).tolist() == [True, True, False]


def test_strides_and_empty(backend):
    wide, (values, indices) = student(8, 60), teacher(6, 30, 4)
    views = [wide[1:7, ::2], wide.reshape(2, 4, 60)[:, :-1, 30:].reshape(6, 30), wide.t()[:30, :6].t()]
    for s in [*views, wide.reshape(4, 2, 60)[:3, :, 5:35]]:
        leading = s.shape[:-1]
        padded = torch.zeros(*leading, 9)
        padded[..., ::2][..., :4] = values.reshape(*leading, 4)
        check_topk(s, padded[..., ::2][..., :4], indices.reshape(*leading, 4), temperature=2.0)
        check_topk(s, values.reshape(*leading, 4), indices.t().contiguous().t().reshape(*leading, 4))
    check_topk(wide[0], values[0], indices[0], reduction="sum")  # one row [V]
    for reduction, expected in (("sum", torch.zeros(())), ("none", torch.zeros(0, 3))):
        empty = torch.zeros(0, 3, 20), torch.zeros(0, 3, 2), torch.zeros(0, 3, 2, dtype=torch.long)
        loss, grad = topk_and_grad(*empty, reduction=reduction)
        assert torch.equal(loss, expected)
        assert grad.shape == (0, 3, 20)


def test_inplace(backend):
    """The logits become their gradient; in fp16 with a scale, which backward takes away again."""
    for dtype in oracle.DTYPES:
        s, (values, indices) = student(4, 700, dtype), teacher(4, 700, 6)
        labels = indices[:, 0].clone()
        labels[1] = 699
        options = {"temperature": 2.0, "label_weight": 0.25}
        loss, grad = topk_and_grad(s, values, indices, labels, **options)
        leaf = s.clone().requires_grad_()
        logits = leaf * 1
        memory = logits.data_ptr()
        other = topk_kd_loss(logits, values, indices, labels, inplace=True, **options)
        other.backward()
        assert torch.equal(other.detach(), loss)
        torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=0)
        assert logits.data_ptr() == memory


def test_threads(backend, threads):
    s, (values, indices) = student(64, 1500), teacher(64, 1500, 8)
    check_topk(s, values, indices, temperature=2.0)


def test_the_oracle_is_a_divergence():
    """Of the oracle itself: its gradient is that of its value, by finite differences."""
    s = torch.randn(12, dtype=F64)
    for tail in TAILS:
        values, indices = [-1.0, -2.5, -3.0], [3, 8, 1]
        loss, grad = topk_row(s, values, indices, tail, 1.5 if tail == "renormalize" else 1.0)
        for v in range(12):
            moved = s.clone()
            moved[v] += 1e-6
            up, _ = topk_row(moved, values, indices, tail, 1.5 if tail == "renormalize" else 1.0)
            assert abs((up - loss) / 1e-6 - grad[v]) < 1e-5
