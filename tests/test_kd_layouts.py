"""Shapes, strides, memory and threads: the same numbers wherever the logits lie and whoever computes them.

Strided logits are compared with their contiguous copies bit by bit: the layout must not show in the result. Only in
pure torch it may, within the tolerance: torch sums a transposed tensor in another order.
"""

import pytest
import torch

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import check_kd, kd_and_grad

ROWS, COLUMNS = 6, 2085  # one block of the kernels, two vectors of the widest level, and 5 columns


def offset(t, elements):
    """The same values at an address that is `elements` past an aligned one."""
    memory = torch.empty(t.numel() + elements, dtype=t.dtype)[elements:]
    return memory.view(t.shape).copy_(t)


def padded(t, columns):
    """The same values as a view of rows that are `columns` wider."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + columns), float("nan"), dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def assert_same(backend, actual, expected):
    """To the last bit on the CPU; the CUDA kernels cut a row into vectors by its address, so sums differ in order."""
    if backend in ("reference", "simt", "cuda"):
        oracle.assert_norm_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


VIEWS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "rows of a wider tensor": lambda t: padded(t, 3),
    "offset by one element": lambda t: offset(t, 1),
    "offset by three elements": lambda t: offset(t, 3),
    "last rows of a wider tensor": lambda t: padded(torch.cat([t[:1], t]), 1)[1:],
}


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_logits(backend, view, dtype):
    s, t = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS, COLUMNS).to(dtype)
    labels = torch.randint(COLUMNS, (ROWS,))
    options = {"label_weight": 0.4, "temperature": 2.0, "reduction": "none"}
    loss, grad = kd_and_grad(s, t, labels, **options)
    for student, teacher in [(VIEWS[view](s), t), (s, VIEWS[view](t)), (VIEWS[view](s), VIEWS[view](t))]:
        assert torch.equal(student, s)
        assert torch.equal(teacher, t)
        strided_loss, strided_grad = kd_and_grad(student, teacher, labels, **options)
        assert_same(backend, strided_loss, loss)
        assert_same(backend, strided_grad, grad)
    check_kd(VIEWS[view](s), VIEWS[view](t), labels, **options)


@pytest.mark.parametrize("far", [-1e4, 1e4])
@pytest.mark.parametrize("columns", [7, 37])
def test_strided_logits_far_from_zero(backend, columns, far):
    """What a kernel puts into the lanes beyond the row's end must not become its maximum."""
    s, t = far + torch.randn(ROWS, columns), far + torch.randn(ROWS, columns)
    labels = torch.randint(columns, (ROWS,))
    for view in VIEWS.values():
        check_kd(view(s), view(t), labels, label_weight=0.4, temperature=2.0, reduction="none")


def test_all_but_the_last_position(backend):
    """logits[:, :-1] of a language model: three dimensions that do not merge into rows of one stride."""
    s, t = torch.randn(3, 5, 40), torch.randn(3, 5, 40)
    expected = kd_and_grad(s[:, :-1].contiguous(), t[:, 1:].contiguous(), reduction="none")
    loss, grad = check_kd(s[:, :-1], t[:, 1:], reduction="none")
    assert_same(backend, loss, expected[0])
    assert_same(backend, grad, expected[1])


def test_gradient_through_a_view_fills_only_the_view(backend):
    leaf, t = torch.randn(3, 5, 40, requires_grad=True), torch.randn(3, 5, 40)
    kd_loss(leaf[:, :-1, :32], t[:, 1:, 4:36]).backward()
    _, exact = oracle.kd(leaf[:, :-1, :32], t[:, 1:, 4:36])
    oracle.assert_norm_close(leaf.grad[:, :-1, :32], exact)
    assert not leaf.grad[:, -1].any()
    assert not leaf.grad[..., 32:].any()


def test_expanded_teacher_and_student(backend):
    s, t = torch.randn(4, 7, 33), torch.randn(33)
    check_kd(s, t.expand(4, 7, 33), temperature=2.0)
    check_kd(s, torch.randn(7, 33).expand(4, 7, 33), temperature=2.0)
    check_kd(s, torch.randn(4, 1, 33).expand(4, 7, 33), temperature=2.0)
    check_kd(t.expand(4, 7, 33), s, temperature=2.0)
    # A column stride of 0: uniform distributions.
    check_kd(s, torch.randn(4, 7, 1).expand(4, 7, 33), temperature=2.0)


def test_strided_arguments_per_row(backend):
    s, t = torch.randn(4, 3, 20), torch.randn(4, 3, 20)
    labels = torch.randint(20, (3, 4))
    temperature, weight = 0.5 + torch.rand(3, 8), torch.rand(4, 3, 2)
    options = {"label_weight": 0.3, "reduction": "none"}
    views = {"temperature": temperature[:, ::2].T, "row_weight": weight[..., 1]}
    copies = {name: view.contiguous() for name, view in views.items()}
    expected = check_kd(s, t, labels.T.contiguous(), **copies, **options)
    loss, grad = kd_and_grad(s, t, labels.T, **views, **options)
    assert_same(backend, loss, expected[0])
    assert_same(backend, grad, expected[1])
    one = torch.tensor([0.5]).expand(4, 3)
    loss, _ = kd_and_grad(s, t, labels.T, temperature=one, row_weight=one, **options)
    again, _ = kd_and_grad(s, t, labels.T, temperature=0.5, row_weight=one.contiguous(), **options)
    assert torch.equal(loss, again)


# ------------------------------------------------------------------------------------------------------- shapes


def test_one_row(backend):
    s, t = torch.randn(50), torch.randn(50)
    for reduction in ("mean", "sum", "none"):
        loss, _ = check_kd(s, t, reduction=reduction, temperature=2.0)
        assert loss.shape == ()
    check_kd(
        s, t, torch.tensor(7), label_weight=0.5, temperature=torch.tensor(2.0), row_weight=torch.tensor(3.0)
    )


@pytest.mark.parametrize("shape", [(0, 9), (0, 3, 9), (3, 0, 9), (2, 0, 0, 9)])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_no_rows(backend, reduction, shape):
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    for arguments in (
        {},
        {"labels": labels, "label_weight": 0.5, "row_weight": labels, "temperature": labels + 1},
    ):
        s.grad = None
        loss = kd_loss(s, t, reduction=reduction, **arguments)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        assert loss.sum().item() == 0
        loss.sum().backward()
        assert s.grad.shape == shape


def test_more_than_eight_leading_dimensions(backend):
    """Permuted, so that they do not merge; 12 dimensions, as no fixed-size array of strides in a kernel foresees."""
    shape = (2, 1, 3, 1, 2, 2, 1, 2, 1, 2, 2)
    order = (10, 3, 5, 0, 8, 2, 9, 1, 7, 4, 6)
    s, t = torch.randn(*shape, 13).permute(*order, 11), torch.randn(*shape, 13).permute(*order, 11)
    expected = kd_and_grad(s.contiguous(), t.contiguous(), reduction="none")
    loss, grad = check_kd(s, t, reduction="none")
    assert_same(backend, loss, expected[0])
    assert_same(backend, grad, expected[1])


def test_many_short_rows(backend, threads):
    """10 classes: the rows are shorter than a vector at the widest level, and many go to each thread."""
    s, t = torch.randn(5000, 10), torch.randn(5000, 10)
    leaf = s.double().requires_grad_()
    log_p, log_q = torch.log_softmax(leaf / 2, -1), torch.log_softmax(t.double() / 2, -1)
    exact = 4 * torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    exact.backward()
    loss, grad = kd_and_grad(s, t, temperature=2.0)
    oracle.assert_norm_close(loss, exact)
    oracle.assert_norm_close(grad, leaf.grad)


@pytest.mark.parametrize("rows, columns", [(1_400_000, 3), (42, 100_003)])
def test_gradient_larger_than_the_cache(backend, rows, columns):
    """Above 8 MiB the native kernels store around the cache, from the first aligned address of a row on. Odd widths:
    rows start at every alignment. 3 columns: a row ends before its first aligned address."""
    s, t = torch.randn(rows, columns), torch.randn(rows, columns)
    labels = torch.randint(columns, (rows,))
    leaf = s.double().requires_grad_()
    log_p, log_q = torch.log_softmax(leaf / 2, -1), torch.log_softmax(t.double() / 2, -1)
    soft = 4 * torch.nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    exact = 0.5 * soft + 0.5 * torch.nn.functional.cross_entropy(leaf, labels)
    exact.backward()
    loss, grad = kd_and_grad(s, t, labels, label_weight=0.5, temperature=2.0)
    oracle.assert_norm_close(loss, exact)
    oracle.assert_norm_close(grad, leaf.grad)


def test_rows_that_start_beyond_two_to_the_31_elements(backend):
    """Offsets are 64-bit. The memory between the rows is never touched, so it costs nothing."""
    row_stride, columns = 2**31 + 5, 40
    try:
        memory = torch.empty(row_stride + columns, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of address space: {error}")
    s = memory.as_strided((2, columns), (row_stride, 1)).copy_(torch.randn(2, columns))
    t = torch.randn(2, columns)
    check_kd(s, t, temperature=2.0)
    check_kd(t, s, temperature=2.0)


# ------------------------------------------------------------------------------------------------- determinism


def run_with_threads(n, *args, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return kd_and_grad(*args, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows, columns", [(3000, 50), (7, 20_000), (1, 200_000)])
def test_threads_do_not_show_in_the_result(backend, rows, columns, reduction):
    s, t = torch.randn(rows, columns), torch.randn(rows, columns)
    labels = torch.randint(columns, (rows,))
    options = {"label_weight": 0.4, "temperature": 2.0, "reduction": reduction}
    loss, grad = run_with_threads(1, s, t, labels, **options)
    for n in (2, 3, 2):
        again, again_grad = run_with_threads(n, s, t, labels, **options)
        assert torch.equal(again, loss)
        assert torch.equal(again_grad, grad)


def test_a_row_does_not_depend_on_its_neighbours(backend):
    """The loss of a row is the same number alone and in a batch: batch size does not show either."""
    s, t = torch.randn(9, 3000), torch.randn(9, 3000)
    loss, grad = kd_and_grad(s, t, temperature=2.0, reduction="none")
    for i in (0, 4, 8):
        alone, alone_grad = kd_and_grad(s[i], t[i], temperature=2.0, reduction="none")
        assert_same(backend, alone, loss[i])
        assert_same(backend, alone_grad, grad[i])


def test_inputs_are_not_written(backend):
    s, t = torch.randn(5, 300), torch.randn(5, 300)
    labels, weight, temperature = torch.randint(300, (5,)), torch.rand(5), torch.rand(5) + 0.5
    tensors = (s, t, labels, weight, temperature)
    before, versions = [x.clone() for x in tensors], [x._version for x in tensors]
    kd_and_grad(s, t, labels, label_weight=0.5, row_weight=weight, temperature=temperature)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert [x._version for x in tensors] == versions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_stored_around_the_cache(backend, dtype):
    # From 8 MiB on the native kernels use other stores, which want alignment: rows of odd width have none.
    rows, vocab = 35, 140_001
    student, teacher = torch.randn(rows, vocab).to(dtype), torch.randn(rows, vocab).to(dtype)
    leaf = student.clone().requires_grad_()
    kd_loss(leaf, teacher, temperature=2.0, reduction="sum").backward()
    for i in (0, 1, 2, 17, rows - 1):
        row = student[i : i + 1].clone().requires_grad_()
        kd_loss(row, teacher[i : i + 1], temperature=2.0, reduction="sum").backward()
        _, exact = oracle.kd(student[i : i + 1], teacher[i : i + 1], temperature=2.0, reduction="sum")
        oracle.assert_norm_close(leaf.grad[i : i + 1], exact)
        if backend.startswith("cpu"):
            assert torch.equal(leaf.grad[i], row.grad[0])
