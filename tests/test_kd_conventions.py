"""The conventions of kd_loss, one test each: what is weighed, what is counted, what it is divided by."""

import pytest
import torch
import torch.nn.functional as F

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import check_kd, kd_and_grad

IGNORE = -100
NAN = float("nan")


@pytest.fixture
def batch():
    """2 x 3 rows of 11 logits, labels with two rows ignored, and weights with one row of weight 0."""
    s, t = 2 * torch.randn(2, 3, 11), 2 * torch.randn(2, 3, 11)
    labels = torch.tensor([[0, IGNORE, 10], [IGNORE, 4, 5]])
    weight = torch.tensor([[0.5, 2.0, 0.0], [1.5, 3.0, 0.25]])
    return s, t, labels, weight


def rows_of(s, t):
    """T^2-free KL at T = 1 per row by torch in float64: a second opinion beside the oracle."""
    log_p, log_q = F.log_softmax(s.double(), -1), F.log_softmax(t.double(), -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


# ------------------------------------------------------------------------------------------------ T^2, weights


def test_t_squared_multiplies_loss_and_gradient(backend, batch):
    s, t, *_ = batch
    scaled = check_kd(s, t, temperature=3.0)
    plain = check_kd(s, t, temperature=3.0, scale_by_t2=False)
    torch.testing.assert_close(scaled[0], 9 * plain[0])
    torch.testing.assert_close(scaled[1], 9 * plain[1])


def test_t_squared_is_on_by_default_and_leaves_the_label_term_alone(backend, batch):
    s, t, labels, _ = batch
    on = check_kd(s, t, labels, label_weight=0.5, temperature=3.0)
    off = check_kd(s, t, labels, label_weight=0.5, temperature=3.0, scale_by_t2=False)
    counted = labels != IGNORE
    soft = F.kl_div(F.log_softmax(s[counted] / 3, -1), F.softmax(t[counted] / 3, -1), reduction="batchmean")
    torch.testing.assert_close(on[0] - off[0], 0.5 * 8 * soft)


def test_loss_is_the_weighted_sum_of_the_two_terms(backend, batch):
    s, t, labels, _ = batch
    counted = labels != IGNORE
    hard = F.cross_entropy(s[counted], labels[counted])
    soft = (
        F.kl_div(F.log_softmax(s[counted] / 2, -1), F.softmax(t[counted] / 2, -1), reduction="batchmean") * 4
    )
    for w in (0.0, 0.3, 1.0):
        loss, _ = check_kd(s, t, labels, label_weight=w, temperature=2.0)
        torch.testing.assert_close(loss, w * hard + (1 - w) * soft)


def test_teacher_is_read_at_temperature_and_labels_at_one(backend, batch):
    s, t, labels, _ = batch
    loss, _ = kd_and_grad(s, t, labels, label_weight=1.0, temperature=7.0)
    torch.testing.assert_close(loss, F.cross_entropy(s.flatten(0, 1), labels.flatten()))


def test_label_weight_zero_uses_labels_only_to_ignore_rows(backend, batch):
    s, t, labels, _ = batch
    loss, grad = check_kd(s, t, labels, label_weight=0.0, temperature=2.0)
    counted = labels != IGNORE
    alone, alone_grad = check_kd(s[counted], t[counted], temperature=2.0)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad[counted], alone_grad)
    assert not grad[~counted].any()


@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
def test_label_smoothing_is_cross_entropys(backend, batch, smoothing):
    s, t, labels, _ = batch
    loss, grad = check_kd(s, t, labels, label_weight=1.0, label_smoothing=smoothing)
    leaf = s.clone().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)
    check_kd(s, t, labels, label_weight=0.4, label_smoothing=smoothing, temperature=3.0)


# -------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("ignored_rows", ["skip", "distill"])
def test_reductions(backend, batch, reduction, ignored_rows):
    s, t, labels, weight = batch
    check_kd(s, t, reduction=reduction)
    check_kd(s, t, reduction=reduction, row_weight=weight)
    options = {"label_weight": 0.3, "temperature": 2.0, "ignored_rows": ignored_rows, "reduction": reduction}
    check_kd(s, t, labels, **options)
    check_kd(s, t, labels, row_weight=weight, **options)


def test_mean_divides_by_the_weights_of_counted_rows(backend, batch):
    s, t, labels, weight = batch
    counted = labels != IGNORE
    rows = rows_of(s, t)
    mean, _ = kd_and_grad(s, t, labels, label_weight=0.0)
    torch.testing.assert_close(mean.double(), rows[counted].mean())
    mean, _ = kd_and_grad(s, t, labels, label_weight=0.0, row_weight=weight)
    expected = (weight * rows)[counted].sum() / weight[counted].sum()
    torch.testing.assert_close(mean.double(), expected)


def test_batchmean_divides_by_the_first_dimension(backend, batch):
    s, t, labels, _ = batch
    loss, _ = kd_and_grad(s, t, reduction="batchmean")
    torch.testing.assert_close(loss, F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="batchmean"))
    # Also where rows are ignored: the divisor of batchmean is a shape, not a count.
    loss, _ = kd_and_grad(s, t, labels, label_weight=0.0, reduction="batchmean")
    torch.testing.assert_close(loss.double(), rows_of(s, t)[labels != IGNORE].sum() / 2)


def test_sum_and_none(backend, batch):
    s, t, labels, weight = batch
    loss, _ = kd_and_grad(s, t, labels, label_weight=0.0, row_weight=weight, reduction="none")
    assert loss.shape == (2, 3)
    expected = torch.where(labels == IGNORE, 0.0, weight * rows_of(s, t))
    torch.testing.assert_close(loss.double(), expected.double())
    total, _ = kd_and_grad(s, t, labels, label_weight=0.0, row_weight=weight, reduction="sum")
    torch.testing.assert_close(total, loss.sum())


# --------------------------------------------------------------------------------------------------- num_items


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize(
    "form", [int, float, torch.tensor, lambda n: torch.tensor([n]), lambda n: torch.tensor(float(n))]
)
def test_num_items_replaces_the_divisor(backend, batch, form, reduction):
    s, t, labels, weight = batch
    total, total_grad = kd_and_grad(s, t, labels, label_weight=0.3, row_weight=weight, reduction="sum")
    loss, grad = kd_and_grad(
        s, t, labels, label_weight=0.3, row_weight=weight, reduction=reduction, num_items=form(17)
    )
    torch.testing.assert_close(loss, total / 17)
    torch.testing.assert_close(grad, total_grad / 17)


@pytest.mark.parametrize("form", [tuple, list, torch.tensor])
def test_num_items_pair_sets_both_divisors(backend, batch, form):
    s, t, labels, _ = batch
    options = {"label_weight": 0.3, "temperature": 2.0, "ignored_rows": "distill"}
    loss, grad = kd_and_grad(s, t, labels, num_items=form([12, 7]), **options)
    exact, exact_grad = oracle.kd(s, t, labels, num_items=(12, 7), **options)
    oracle.assert_norm_close(loss, exact)
    oracle.assert_norm_close(grad, exact_grad)


def test_num_items_makes_accumulation_equal_to_one_batch(backend, batch):
    """Micro-batches with different numbers of counted rows: the mean of means would be another loss."""
    s, t, labels, _ = batch
    whole, whole_grad = check_kd(s, t, labels, label_weight=0.5)
    n = int((labels != IGNORE).sum())
    parts = [kd_and_grad(s[i], t[i], labels[i], label_weight=0.5, num_items=n) for i in range(2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.stack([g for _, g in parts]), whole_grad)


# ------------------------------------------------------------------------------------------------ ignored rows


def test_distill_averages_each_term_over_its_own_rows(backend, batch):
    s, t, labels, _ = batch
    loss, grad = check_kd(s, t, labels, label_weight=0.3, ignored_rows="distill", temperature=2.0)
    soft = 4 * F.kl_div(
        F.log_softmax(s / 2, -1).flatten(0, 1), F.softmax(t / 2, -1).flatten(0, 1), reduction="batchmean"
    )
    hard = F.cross_entropy(s.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, 0.7 * soft + 0.3 * hard)
    assert grad[0, 1].any()


def test_distill_without_a_labelled_row_has_no_label_term(backend, batch):
    s, t, labels, _ = batch
    loss, _ = check_kd(s, t, torch.full_like(labels, IGNORE), label_weight=0.25, ignored_rows="distill")
    torch.testing.assert_close(loss.double(), 0.75 * rows_of(s, t).mean())


def test_ignore_index_can_be_any_number(backend, batch):
    s, t, labels, _ = batch
    expected = check_kd(s, t, labels, label_weight=0.5)
    for index in (-1, 3, 2**40):
        relabelled = torch.where(labels == IGNORE, index, labels)
        loss, grad = kd_and_grad(s, t, relabelled, label_weight=0.5, ignore_index=index)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_uncounted_rows_are_not_read(backend, batch, reduction, dtype):
    """NaN in an ignored row or a row of weight 0, on either side, changes nothing: not a bit."""
    s, t, labels, weight = (x.to(dtype) if x.is_floating_point() else x for x in batch)
    options = {"label_weight": 0.3, "temperature": 2.0, "row_weight": weight.float(), "reduction": reduction}
    expected = check_kd(s, t, labels, **options)
    skipped = (labels == IGNORE) | (weight == 0)
    s[skipped], t[skipped] = NAN, NAN
    loss, grad = kd_and_grad(s, t, labels, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    assert not grad[skipped].any()


def test_row_weight_zero_is_not_read_under_distill_either(backend, batch):
    s, t, labels, weight = batch
    options = {"label_weight": 0.3, "row_weight": weight, "ignored_rows": "distill"}
    expected = check_kd(s, t, labels, **options)
    s[weight == 0], t[weight == 0] = NAN, NAN
    loss, grad = kd_and_grad(s, t, labels, **options)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("how", ["labels", "row_weight", "both, distill"])
def test_nothing_counted_is_exactly_zero_and_attached(backend, batch, how, reduction, dtype):
    s, t, labels, weight = batch
    s, t = torch.full_like(s, NAN).to(dtype), t.to(dtype)
    options = {
        "labels": {"labels": torch.full_like(labels, IGNORE), "label_weight": 0.5},
        "row_weight": {"row_weight": torch.zeros_like(weight)},
        "both, distill": {
            "labels": labels,
            "label_weight": 0.5,
            "row_weight": torch.zeros_like(weight),
            "ignored_rows": "distill",
        },
    }[how]
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf * 1, t, reduction=reduction, **options)
    assert loss.item() == 0
    assert loss.requires_grad
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(s))


# -------------------------------------------------------------------------------------- per row and vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_temperature_per_row(backend, batch, dtype):
    s, t, labels, _ = batch
    # 1 among them: its label term needs no exponentials of its own, so it takes another path.
    temperature = torch.tensor([[1, 2, 4], [8, 1, 3]]).to(dtype)
    check_kd(s, t, temperature=temperature, reduction="none")
    check_kd(s, t, temperature=temperature, scale_by_t2=False)
    loss, grad = check_kd(s, t, labels, temperature=temperature, label_weight=0.4, reduction="none")
    for i in range(2):
        for j in range(3):
            one = kd_and_grad(
                s[i, j],
                t[i, j],
                labels[i, j],
                label_weight=0.4,
                temperature=float(temperature[i, j]),
                reduction="sum",
            )
            torch.testing.assert_close(loss[i, j], one[0])
            torch.testing.assert_close(grad[i, j], one[1])


def test_temperature_as_a_tensor_of_one_number(backend, batch):
    s, t, *_ = batch
    expected = kd_and_grad(s, t, temperature=2.0)
    loss, grad = kd_and_grad(s, t, temperature=torch.tensor(2.0))
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.float16, torch.float32, torch.float64], ids=str
)
def test_row_weight(backend, batch, dtype):
    s, t, labels, weight = batch
    weight = (2 * weight).to(dtype)
    check_kd(s, t, row_weight=weight)
    check_kd(s, t, labels, label_weight=0.4, row_weight=weight, temperature=3.0, reduction="none")


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(11, 11), (13, 9), (9, 16)])
def test_vocab_size_cuts_both_sides(backend, widths, dtype):
    """Padded columns are not read (NaN in them) and have a gradient of exactly 0."""
    s, t = (torch.randn(5, width).to(dtype) for width in widths)
    labels = torch.randint(8, (5,))
    s[:, 8:], t[:, 8:] = NAN, NAN
    loss, grad = kd_and_grad(
        s, t, labels, label_weight=0.3, label_smoothing=0.1, temperature=2.0, vocab_size=8
    )
    cut = check_kd(s[:, :8], t[:, :8], labels, label_weight=0.3, label_smoothing=0.1, temperature=2.0)
    assert torch.equal(loss, cut[0])
    assert torch.equal(grad[:, :8], cut[1])
    assert torch.equal(grad[:, 8:], torch.zeros_like(grad[:, 8:]))


def test_vocab_size_with_long_rows(backend):
    """Padding as models have it: 128256 columns cut to 128000, in the middle of a block of the kernels."""
    s, t = torch.randn(2, 128_256), torch.randn(2, 128_064)
    s[:, 128_000:] = 1e30
    loss, grad = kd_and_grad(s, t, temperature=2.0, vocab_size=128_000)
    exact, exact_grad = oracle.kd(s, t, temperature=2.0, vocab_size=128_000)
    oracle.assert_norm_close(loss, exact)
    oracle.assert_norm_close(grad, exact_grad)
    assert not grad[:, 128_000:].any()


def test_shifted_labels_beside_whole_logits(backend):
    """The documented way to predict the next token: shift labels, not logits."""
    s, t = torch.randn(2, 6, 9), torch.randn(2, 6, 9)
    tokens = torch.randint(9, (2, 6))
    labels = F.pad(tokens, (0, 1), value=IGNORE)[..., 1:]
    loss, grad = check_kd(s, t, labels, label_weight=0.5, temperature=2.0)
    shifted, shifted_grad = check_kd(s[:, :-1], t[:, :-1], tokens[:, 1:], label_weight=0.5, temperature=2.0)
    torch.testing.assert_close(loss, shifted)
    torch.testing.assert_close(grad[:, :-1], shifted_grad)
    assert not grad[:, -1].any()
