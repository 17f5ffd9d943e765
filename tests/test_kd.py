"""kd_loss against float64: the accuracy bounds that the package promises, on every backend.

Independent logits: loss and gradient to 2e-6 relative, norm-wise (1e-12 in float64). Rows where student and teacher
nearly agree are limited by cancellation: 1e-7 T^2 per row for the loss, 1e-6 T (‖p‖ + ‖q‖) for the gradient. A
16-bit gradient is one rounding of a value within the float32 bound.
"""

import pytest
import torch

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import check_kd, kd_and_grad

TEMPERATURES = [0.5, 1.0, 3.0, 8.0]
# The kernels take columns in vectors of 4 to 16 and in blocks of 2048. 2: the smallest softmax. 17: one vector and
# one column. 2049: one block and one column. 32000 and 200000: vocabularies, many blocks. Rows: enough for a norm
# over short rows to mean something, few for long ones.
SHAPES = [(64, 2), (48, 17), (6, 2049), (3, 32_000), (2, 200_000)]


def logits(rows, columns, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(rows, columns)).to(dtype)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_independent_logits(backend, rows, columns, scale, temperature):
    s, t = logits(rows, columns, scale), logits(rows, columns, scale)
    check_kd(s, t, temperature=temperature, reduction="none")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("rows, columns", [(64, 10), (3, 32_000)])
def test_independent_logits_with_labels(backend, threads, rows, columns, scale, temperature):
    s, t = logits(rows, columns, scale), logits(rows, columns, scale)
    y = torch.randint(columns, (rows,))
    check_kd(s, t, y, label_weight=0.3, label_smoothing=0.1, temperature=temperature)
    check_kd(s, t, y, label_weight=1.0, temperature=temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("difference", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("rows, columns", [(200, 3), (48, 17), (6, 2049), (1, 100_000)])
def test_near_equal_rows(backend, rows, columns, scale, difference, temperature):
    s = logits(rows, columns, scale)
    t = s + difference * temperature * torch.randn(rows, columns)
    loss, grad = kd_and_grad(s, t, temperature=temperature, reduction="none")
    exact_loss, exact_grad = oracle.kd(s, t, temperature=temperature, reduction="none")
    loss_error = (loss - exact_loss).abs().max().item()
    assert loss_error <= 1e-7 * temperature**2
    p, q = (torch.softmax(z.double() / temperature, -1) for z in (s, t))
    bound = 1e-6 * temperature * (p.norm(dim=-1) + q.norm(dim=-1))
    assert ((grad - exact_grad).norm(dim=-1) <= bound).all()


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 100])
def test_equal_logits_give_zero(backend, scale, dtype):
    s = logits(8, 2049, scale, dtype)
    for temperature in TEMPERATURES:
        loss, grad = kd_and_grad(s, s.clone(), temperature=temperature, reduction="none")
        assert loss.abs().max() <= 1e-6
        assert grad.abs().max() <= 1e-6 * temperature


def test_nearly_equal_is_not_clamped_to_zero(backend):
    """A loss that is small because the rows nearly agree keeps its digits: 1e-5 here."""
    s = logits(64, 100)
    t = s + 0.005 * torch.randn(64, 100)
    loss, _ = kd_and_grad(s, t, temperature=1.0)
    exact, _ = oracle.kd(s, t, temperature=1.0)
    assert 5e-6 < exact < 5e-5
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1, 10, 100])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rows, columns", [(64, 2), (48, 17), (6, 2049), (2, 32_000)])
def test_float64(backend, rows, columns, temperature, scale):
    s, t = logits(rows, columns, scale, torch.float64), logits(rows, columns, scale, torch.float64)
    y = torch.randint(columns, (rows,))
    check_kd(s, t, temperature=temperature, reduction="none")
    check_kd(s, t, y, label_weight=0.3, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, columns", SHAPES)
def test_16_bit_gradient_is_one_rounding(backend, rows, columns, dtype):
    """Of a value within the float32 bound, element by element, wherever the dtype has its full precision."""
    s, t = logits(rows, columns, 3, dtype), logits(rows, columns, 3, dtype)
    # A loss scale, as in AMP: brings the gradients of 200000 columns out of fp16's subnormal numbers.
    upstream = 2.0**10 if dtype == torch.float16 else 1.0
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf, t, temperature=3.0, reduction="sum")
    (loss * upstream).backward()
    exact_loss, exact = oracle.kd(s, t, temperature=3.0, reduction="sum")
    oracle.assert_norm_close(loss, exact_loss)
    exact = exact * upstream
    oracle.assert_norm_close(leaf.grad, exact)
    full = exact.abs() >= torch.finfo(dtype).tiny
    slack = oracle.TOLERANCES[torch.float32].relative * exact.norm(dim=-1, keepdim=True).expand_as(exact)
    assert full.float().mean() > 0.5
    oracle.assert_one_rounding(leaf.grad[full], exact[full], slack[full])


@pytest.mark.parametrize("teacher_dtype", oracle.DTYPES, ids=lambda d: f"teacher-{d}")
@pytest.mark.parametrize("student_dtype", oracle.DTYPES, ids=lambda d: f"student-{d}")
def test_teacher_has_its_own_dtype(backend, student_dtype, teacher_dtype):
    # 2 * 2048 + 33 columns: whole blocks, whole vectors and a rest in every conversion.
    s, t = logits(3, 4129, 2, student_dtype), logits(3, 4129, 2, teacher_dtype)
    y = torch.randint(4129, (3,))
    check_kd(s, t, y, label_weight=0.25, temperature=2.0)


@pytest.mark.parametrize("columns", [2, 15, 16, 17, 2047, 2048, 2049, 4097])
def test_widths_at_the_edges_of_vectors_and_blocks(backend, columns):
    s, t = logits(5, columns), logits(5, columns)
    y = torch.randint(columns, (5,))
    for temperature in (1.0, 3.0):
        check_kd(s, t, temperature=temperature, reduction="none")
        check_kd(s, t, y, label_weight=0.5, temperature=temperature, reduction="none")


@pytest.mark.parametrize("place", ["first", "last"])
def test_label_in_each_vector_lane_and_block(backend, place):
    """The label's logit has its own line of code in the kernels: every column of a short row, both ends of blocks."""
    columns = list(range(20)) if place == "first" else [2046, 2047, 2048, 2049, 4095, 4096]
    y = torch.tensor(columns)
    s, t = logits(len(y), max(columns) + 1), logits(len(y), max(columns) + 1)
    check_kd(s, t, y, label_weight=0.5, temperature=2.0, reduction="none")
    check_kd(s, t, y, label_weight=0.5, temperature=1.0, reduction="none")
    check_kd(s, t, y, label_weight=1.0, reduction="none")


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_maximum_moves_from_block_to_block(backend, order):
    """The running maximum changes in every block, or never after the first."""
    ramp = torch.linspace(-300, 300, 9000)
    ramp = ramp if order == "rising" else ramp.flip(0)
    s = ramp + logits(4, 9000)
    t = ramp.roll(40) + logits(4, 9000)
    y = torch.tensor([0, 4500, 8990, 8999])
    check_kd(s, t, temperature=4.0, reduction="none")
    check_kd(s, s.flip(-1), y, label_weight=0.5, temperature=4.0, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_of_ten_thousand(backend, dtype):
    s, t = logits(6, 300, 3000).clamp(-1e4, 1e4).to(dtype), logits(6, 300, 3000).clamp(-1e4, 1e4).to(dtype)
    s[0, 5], t[0, 6] = 1e4, -1e4
    check_kd(s, t, torch.randint(300, (6,)), label_weight=0.5, temperature=2.0, reduction="none")


@pytest.mark.parametrize("low", [-1e4, -float("inf")])
def test_one_hot_teacher_is_cross_entropy(backend, low):
    s = logits(10, 50, 3)
    y = torch.randint(50, (10,))
    t = torch.full((10, 50), low).scatter_(1, y[:, None], 0.0)
    loss, grad = check_kd(s, t)
    leaf = s.clone().requires_grad_()
    hard = torch.nn.functional.cross_entropy(leaf, y)
    hard.backward()
    torch.testing.assert_close(loss, hard.detach())
    torch.testing.assert_close(grad, leaf.grad)
