"""Special values: masked vocabularies, rows that have no softmax, the ends of the number range.

Stated results. -inf on both sides: as if the column were not there. -inf at the teacher: no mass. -inf at the student
where the teacher has mass: the loss is +inf, the gradient is finite. NaN, +inf, or -inf throughout, on a side that is
read: NaN in that row's loss and gradient, and in no other row's.
"""

import pytest
import torch
import torch.nn.functional as F

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import check_kd, kd_and_grad

INF = float("inf")
NAN = float("nan")


def logits(rows, columns):
    return torch.randn(rows, columns), torch.randn(rows, columns)


# --------------------------------------------------------------------------------------------------------- -inf


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_masked_vocabulary_is_a_smaller_vocabulary(backend, dtype, temperature):
    s, t = (x.to(dtype) for x in logits(4, 40))
    masked = torch.rand(40) < 0.3
    labels = (~masked).nonzero()[:4, 0]
    options = {"label_weight": 0.4, "temperature": temperature}
    expected = check_kd(s[:, ~masked], t[:, ~masked], labels=torch.arange(4), **options)
    s[:, masked], t[:, masked] = -INF, -INF
    loss, grad = check_kd(s, t, labels, **options)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(grad[:, ~masked], expected[1])
    assert torch.equal(grad[:, masked], torch.zeros_like(grad[:, masked]))


def test_no_teacher_mass_on_a_student_logit(backend):
    """0 log 0 = 0 in the loss; the gradient there is p_v, which is what pushes the student's mass away."""
    s, t = logits(4, 40)
    t[:, ::3] = -INF
    loss, grad = check_kd(s, t, temperature=2.0, reduction="none")
    assert loss.isfinite().all()
    torch.testing.assert_close(grad[:, ::3], 2 * torch.softmax(s / 2, -1)[:, ::3])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_teacher_mass_on_a_student_minus_inf_is_infinite_with_finite_gradient(backend, dtype):
    s, t = (x.to(dtype) for x in logits(4, 40))
    s[1, 7] = -INF
    loss, grad = check_kd(s, t, temperature=2.0, reduction="none")
    assert loss[1] == INF
    assert loss[[0, 2, 3]].isfinite().all()
    assert grad.isfinite().all()
    # (p - q) T with p = 0: more of this logit, as much as there is of it.
    q = torch.softmax(t[1].double() / 2, -1)[7]
    assert grad[1, 7].item() == pytest.approx(-2 * q.item(), rel=1e-2)
    assert kd_and_grad(s, t, temperature=2.0)[0] == INF


def test_label_on_a_student_minus_inf_is_infinite_with_finite_gradient(backend):
    s, t = logits(3, 20)
    s[0, 4], t[0, 4] = -INF, -INF
    labels = torch.tensor([4, 1, 2])
    loss, grad = check_kd(s, t, labels, label_weight=0.5, temperature=2.0, reduction="none")
    assert loss[0] == INF
    assert loss[1:].isfinite().all()
    assert grad.isfinite().all()
    assert grad[0, 4] == -0.5


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_over_a_student_minus_inf_is_infinite_with_finite_gradient(backend, smoothing):
    """Smoothing puts mass on every column. With smoothing 1 the label has no mass of its own, and 0 * inf = 0."""
    s, t = logits(3, 20)
    s[0, 4], t[0, 4] = -INF, -INF
    for label in (3, 4):
        labels = torch.tensor([label, 1, 2])
        loss, grad = check_kd(
            s, t, labels, label_weight=0.5, label_smoothing=smoothing, temperature=2.0, reduction="none"
        )
        assert loss[0] == INF
        assert grad.isfinite().all()


# Three blocks of 2048 columns and a rest. A whole block of -inf has no maximum to subtract, and where it is the first
# the running maximum is still -inf.
BLOCKS = {
    "start": slice(0, 4500),
    "middle": slice(1500, 6100),
    "one block exactly": slice(2048, 4096),
    "end": slice(3000, 7000),
    "all but the last": slice(0, 6999),
    "all but the first": slice(1, 7000),
}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("place", BLOCKS)
@pytest.mark.parametrize("side", ["both", "teacher", "student"])
def test_a_block_of_minus_inf_inside_a_row(backend, side, place, temperature):
    s, t = logits(3, 7000)
    block = BLOCKS[place]
    outside = torch.ones(7000, dtype=torch.bool)
    outside[block] = False
    labels = outside.nonzero()[[0, -1, 0], 0]
    if side != "teacher":
        s[:, block] = -INF
    if side != "student":
        t[:, block] = -INF
    loss, grad = check_kd(s, t, temperature=temperature, reduction="none")
    check_kd(s, t, labels, label_weight=0.5, temperature=temperature, reduction="none")
    assert (loss == INF).all() == (side == "student")
    assert grad.isfinite().all()


def test_blocks_of_minus_inf_at_different_places_of_the_two_sides(backend):
    """Student and teacher start with -inf blocks of different length: their references move in different blocks."""
    s, t = logits(3, 9000)
    s[0, :2048], t[0, :4096] = -INF, -INF
    s[1, :4096], t[1, :2048] = -INF, -INF
    s[2, 2048:4096], t[2, 4096:6144] = -INF, -INF
    loss, _ = check_kd(s, t, temperature=2.0, reduction="none")
    assert (loss == INF).tolist() == [False, True, True]


def test_large_logits_beside_a_block_of_minus_inf(backend):
    """A reference of 0 for an empty block must not meet a row far from 0: exp(0 - 1e4) and exp(0 + 1e4)."""
    for far in (-1e4, 1e4):
        s, t = logits(3, 7000)
        s, t = s + far, t + far
        s[0, :3000], t[0, :3000] = -INF, -INF
        s[1, 3000:], t[1, 3000:] = -INF, -INF
        loss, _ = check_kd(
            s, t, torch.tensor([3000, 0, 5]), label_weight=0.5, temperature=2.0, reduction="none"
        )
        assert loss.isfinite().all()


# ------------------------------------------------------------------------------------- rows without a softmax


def all_ones(row):
    """Another NaN than float("nan"): every bit of its payload is set."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[row.element_size()]
    row.view(bits)[7] = -1
    return row


BROKEN = {
    "NaN": lambda row: row.index_fill_(0, torch.tensor([7]), NAN),
    "+inf": lambda row: row.index_fill_(0, torch.tensor([7]), INF),
    "NaN of all ones": all_ones,
    "NaN and +inf": lambda row: row.index_copy_(
        0, torch.tensor([3, 9]), torch.tensor([NAN, INF]).to(row.dtype)
    ),
    "-inf throughout": lambda row: row.fill_(-INF),
    "NaN throughout": lambda row: row.fill_(NAN),
    "+inf throughout": lambda row: row.fill_(INF),
    "NaN after -inf": lambda row: row.fill_(-INF).index_fill_(0, torch.tensor([len(row) - 1]), NAN),
    "+inf last": lambda row: row.index_fill_(0, torch.tensor([len(row) - 1]), INF),
}


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_row_without_a_softmax_is_nan_and_no_other(backend, what, side, dtype):
    # 21 columns: a vector and a rest at every level. 4099: two blocks and a rest.
    for columns in (21, 4099):
        s, t = (x.to(dtype) for x in logits(3, columns))
        labels = torch.tensor([0, 1, 2])
        options = {"label_weight": 0.5, "temperature": 2.0, "reduction": "none"}
        expected = check_kd(s, t, labels, **options)
        if side != "teacher":
            BROKEN[what](s[1])
        if side != "student":
            BROKEN[what](t[1])
        loss, grad = kd_and_grad(s, t, labels, **options)
        assert loss[1].isnan()
        assert grad[1].isnan().all()
        assert torch.equal(loss[[0, 2]], expected[0][[0, 2]])
        assert torch.equal(grad[[0, 2]], expected[1][[0, 2]])
        assert kd_and_grad(s, t, labels, label_weight=0.5)[0].isnan()


def test_a_nan_at_every_column_is_seen(backend):
    """Whatever the lane, the unrolled part or the rest it falls into. Columns: more than four vectors of any level."""
    columns = 150
    s, t = torch.randn(columns, columns), torch.randn(columns, columns)
    hit = s.clone()
    hit.fill_diagonal_(NAN)
    assert kd_loss(hit, t, reduction="none").isnan().all()
    assert kd_loss(s, hit, reduction="none").isnan().all()
    assert (
        kd_loss(hit, t, torch.zeros(columns, dtype=torch.int64), label_weight=1.0, reduction="none")
        .isnan()
        .all()
    )


@pytest.mark.parametrize("teacher_counts", [True, False])
def test_unchecked_label_out_of_range_is_nan_in_its_row(backend, teacher_counts):
    """Where values are not looked at (compiled code, devices), a wrong label must not read other memory."""
    s, t = logits(5, 20)
    labels = torch.tensor([0, 20, -1, 19, 2**62])
    options = [[], 2.0, 0.5 if teacher_counts else 1.0, 0.1, -100, False, 20, "none", True]
    loss, grad, _ = torch.ops.fasttransfer.kd(s, t, labels, None, None, None, *options, True)
    assert loss.isnan().tolist() == [False, True, True, False, True]
    assert grad.isnan().all(-1).tolist() == [False, True, True, False, True]
    assert grad[[0, 3]].isfinite().all()


def test_teacher_is_not_read_where_only_labels_count(backend):
    s, t = logits(4, 30)
    labels = torch.randint(30, (4,))
    loss, grad = kd_and_grad(s, torch.full_like(t, NAN), labels, label_weight=1.0)
    torch.testing.assert_close(loss, F.cross_entropy(s, labels))
    assert grad.isfinite().all()


# ------------------------------------------------------------------------------------------- ends of the range


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masking_by_the_smallest_number_of_the_dtype(backend, dtype):
    """Many models mask with finfo.min instead of -inf: there is no mass there, and no overflow."""
    s, t = (x.to(dtype) for x in logits(4, 5000))
    s[:, 100:3000], t[:, 100:3000] = torch.finfo(dtype).min, torch.finfo(dtype).min
    loss, grad = check_kd(s, t, torch.arange(4), label_weight=0.5, temperature=2.0)
    assert loss.isfinite()
    assert not grad[:, 100:3000].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_subnormal_and_huge_logits(backend, dtype):
    tiny, huge = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max / 4
    s = torch.tensor([[0.0, tiny, -tiny, 0.0], [huge, huge, 0.0, -huge], [-huge, -huge, -huge, -huge]]).to(
        dtype
    )
    t = torch.tensor([[tiny, 0.0, 0.0, -tiny], [huge, 0.0, 0.0, -huge], [huge, huge, huge, huge]]).to(dtype)
    loss, _ = check_kd(s, t, temperature=2.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 4 * 0.6931471805599453, 0.0]))


def test_a_student_sure_of_the_wrong_class(backend):
    """KL of 1e4/T and more is a number, not an overflow: exp(-1e4) is 0 in float32, its logarithm is not needed."""
    s, t = torch.zeros(2, 30), torch.zeros(2, 30)
    s[:, 0], t[:, 1] = 1e4, 1e4
    for temperature in (0.5, 1.0, 8.0):
        loss, _ = check_kd(s, t, temperature=temperature)
        assert loss.item() == pytest.approx(1e4 * temperature, rel=1e-6)


def test_a_loss_beyond_float32_is_inf(backend):
    s, t = torch.zeros(1, 4), torch.zeros(1, 4)
    s[0, 0], t[0, 1] = 3e38, 3e38
    loss, grad = kd_and_grad(s, t, temperature=8.0)
    assert loss == INF
    assert grad.isfinite().all()


def test_every_float16_is_read_as_it_is(backend):
    """All 63488 finite float16 numbers, subnormals included, as teacher logits of one row each beside a 0."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16)
    x = x[x.isfinite()]
    t = torch.stack([x, torch.zeros_like(x)], -1)
    s = torch.zeros_like(t)
    _, grad = kd_and_grad(s.float(), t, temperature=1.0, reduction="none")
    expected = 0.5 - torch.sigmoid(x.double())
    assert (grad[:, 0] - expected).abs().max() <= 2e-7


def test_every_bfloat16_is_read_as_it_is(backend):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.isfinite()]
    t = torch.stack([x, torch.zeros_like(x)], -1)
    _, grad = kd_and_grad(torch.zeros_like(t).float(), t, temperature=1.0, reduction="none")
    expected = 0.5 - torch.sigmoid(x.double())
    assert (grad[:, 0] - expected).abs().max() <= 2e-7


def values_to_round(dtype):
    """float32 numbers: every tie between two numbers of `dtype`, all kinds of NaN, and 20000 random bit patterns."""
    all_bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = all_bits[all_bits.isfinite()]
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F80FFFF], dtype=torch.int32).view(
        torch.float32
    )
    bits = torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32).view(torch.float32)
    positive = torch.cat([ties, nans, torch.tensor([INF, 0.0, 65519.9, 65520.0, 3.3e38, 3.4e38])])
    return torch.cat([positive, -positive, bits])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_16_bits_is_to_nearest_even(backend, dtype):
    """The gradient 1 times every value, which is a rounding of the value. 19 columns: a vector and a rest."""
    values = values_to_round(dtype)
    ones = torch.ones(len(values), 19, dtype=dtype)
    rounded = torch.ops.fasttransfer.kd_scale(ones, values, torch.empty(0))
    expected = values.to(dtype)[:, None].expand_as(rounded)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.signbit() | rounded.isnan(), expected.signbit() | expected.isnan())
