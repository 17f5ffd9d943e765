"""inplace=True: the student's logits become their gradient. Same numbers, no new memory, and loud when misused."""

import pytest
import torch

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import kd_and_grad


def inplace_kd(values, teacher, *args, upstream=1.0, **options):
    """Loss and gradient, by way of logits that are not a leaf and may be overwritten."""
    leaf = values.clone().requires_grad_()
    loss = kd_loss(leaf * 1, teacher, *args, inplace=True, **options)
    (loss.sum() * upstream).backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
# 2085: a block of the kernels, vectors and a rest. 5: shorter than a vector, where a store must not run over the end.
@pytest.mark.parametrize("rows, columns", [(7, 5), (4, 2085)])
def test_values_are_those_of_the_plain_call(backend, rows, columns, reduction, dtype):
    s, t = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    labels = torch.randint(columns, (rows,))
    labels[1] = -100
    options = {"label_weight": 0.3, "temperature": 2.0, "reduction": reduction}
    for upstream in (1.0, 8.0, -0.3):
        leaf = s.clone().requires_grad_()
        expected = kd_loss(leaf, t, labels, **options)
        (expected.sum() * upstream).backward()
        loss, grad = inplace_kd(s, t, labels, upstream=upstream, **options)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, leaf.grad)


def test_memory_is_the_students(backend):
    """No [rows, V] tensor is allocated: the logits hold their gradient after the call, and backward passes it on."""
    s, t = torch.randn(6, 300), torch.randn(6, 300)
    leaf = s.clone().requires_grad_()
    logits = leaf * 1
    address = logits.data_ptr()
    loss = kd_loss(logits, t, temperature=2.0, inplace=True)
    assert logits.data_ptr() == address
    _, exact = oracle.kd(s, t, temperature=2.0)
    oracle.assert_norm_close(logits.detach(), exact)
    arrived = []
    loss.grad_fn.next_functions[0][0].register_prehook(lambda grads: arrived.append(grads[0].data_ptr()))
    loss.backward()
    assert arrived == [address]


def test_fp16_logits_hold_a_scaled_gradient_and_backward_unscales_it(backend):
    """A mean over 2^20 rows (num_items) is below the smallest fp16 number; the loss scale comes in backward."""
    s, t = torch.randn(4, 500).half(), torch.randn(4, 500).half()
    upstream = 2.0**16
    loss, grad = inplace_kd(s, t, temperature=2.0, num_items=2**20, upstream=upstream)
    exact_loss, exact = oracle.kd(s, t, temperature=2.0, num_items=2**20)
    assert (exact.abs() < 2.0**-25).float().mean() > 0.9  # would be rounded to 0
    oracle.assert_norm_close(loss, exact_loss)
    oracle.assert_norm_close(grad, exact * upstream)


def test_ignored_rows_and_padded_columns_are_zeroed(backend):
    s, t = torch.randn(4, 12), torch.randn(4, 12)
    s[1], s[:, 9:] = float("nan"), float("nan")
    labels = torch.tensor([0, -100, 3, 8])
    loss, grad = inplace_kd(s, t, labels, label_weight=0.5, vocab_size=9)
    expected, expected_grad = kd_and_grad(s, t, labels, label_weight=0.5, vocab_size=9)
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
    assert not grad[1].any()
    assert not grad[:, 9:].any()


def test_strided_logits(backend):
    """The result of x @ w may lie transposed in memory; its gradient then lies so too."""
    s, t = torch.randn(6, 300), torch.randn(6, 300)
    expected, expected_grad = kd_and_grad(s, t, temperature=2.0)
    leaf = s.T.contiguous().T.clone().requires_grad_()
    logits = leaf * 1
    assert not logits.is_contiguous()
    loss = kd_loss(logits, t, temperature=2.0, inplace=True)
    oracle.assert_norm_close(logits.detach(), expected_grad)
    loss.backward()
    oracle.assert_norm_close(loss, expected)
    oracle.assert_norm_close(leaf.grad, expected_grad)


@pytest.mark.parametrize("view", ["view", "unsqueeze", "linear with a bias"])
def test_view_of_the_whole(backend, view):
    """Whole logits that torch calls a view: of nn.Linear with a bias on [B, S, H], or reshaped by hand."""
    x, t = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 11)
    head = torch.nn.Linear(8, 11)
    make = {
        "view": lambda: (x.view(6, 8) @ head.weight.T).view(2, 3, 11),
        "unsqueeze": lambda: (x.view(6, 8) @ head.weight.T)[None].view(2, 3, 11),
        "linear with a bias": lambda: head(x),
    }[view]
    expected = kd_loss(make(), t, temperature=2.0)
    expected_grads = torch.autograd.grad(expected, (x, head.weight))
    logits = make()
    assert logits._is_view()
    address = logits.data_ptr()
    loss = kd_loss(logits, t, temperature=2.0, inplace=True)
    assert logits.data_ptr() == address
    grads = torch.autograd.grad(loss, (x, head.weight))
    assert torch.equal(loss, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other)


def test_no_gradient_nothing_overwritten(backend):
    s, t = torch.randn(3, 9), torch.randn(3, 9)
    before = s.clone()
    expected = kd_loss(s, t)
    assert torch.equal(kd_loss(s, t, inplace=True), expected)
    with torch.no_grad():
        assert torch.equal(kd_loss(s.clone().requires_grad_() * 1, t, inplace=True), expected)
    with torch.inference_mode():
        assert torch.equal(kd_loss(s, t, inplace=True), expected)
    assert torch.equal(s, before)


def test_no_rows(backend):
    leaf = torch.randn(0, 9, requires_grad=True)
    kd_loss(leaf * 1, torch.randn(0, 9), inplace=True).backward()
    assert leaf.grad.shape == (0, 9)


# ------------------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("use", ["logits", "a view", "another loss"])
def test_used_again_is_an_error_in_backward(backend, use):
    leaf, t = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    logits = leaf * 1
    loss = kd_loss(logits, t, inplace=True)
    other = {
        "logits": lambda: logits.sum(),
        "a view": lambda: logits[:, :2].square().sum(),
        "another loss": lambda: kd_loss(logits, t),
    }[use]()
    with pytest.raises(RuntimeError, match=r"student_logits was overwritten .*inplace=True"):
        (loss + other).backward()
    assert leaf.grad is None


def test_used_again_in_place_is_an_error(backend):
    leaf, t = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    logits = leaf * 1
    kd_loss(logits, t, inplace=True)
    with pytest.raises(RuntimeError, match="student_logits was overwritten"):
        kd_loss(logits, t, inplace=True).backward()


def test_logits_that_their_producer_saved_are_torchs_error(backend):
    """exp saves its result for backward: the version counter says that it was overwritten."""
    leaf = torch.randn(3, 9, requires_grad=True)
    loss = kd_loss(leaf.exp(), torch.randn(3, 9), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_saved_by_an_earlier_use_are_torchs_error(backend):
    leaf = torch.randn(3, 9, requires_grad=True)
    logits = leaf * 1
    before = logits.square().sum()
    loss = kd_loss(logits, torch.randn(3, 9), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + before).backward()


def test_overwritten_gradient_is_torchs_error(backend):
    """Changing the overwritten logits by hand changes the saved gradient: that must not pass unnoticed."""
    leaf = torch.randn(3, 9, requires_grad=True)
    logits = leaf * 1
    loss = kd_loss(logits, torch.randn(3, 9), inplace=True)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_that_scales_the_logits_bumps_their_version(backend):
    """The logits hold the gradient, so backward changes them where its upstream gradient is not 1."""
    w, x, t = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    logits = x * 1
    loss = kd_loss(logits, t, inplace=True)
    saved = (w * logits.detach()).sum()
    (3 * loss).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_second_backward(backend):
    """retain_graph leaves the stored gradient as it is."""
    s, t = torch.randn(3, 9), torch.randn(3, 9)
    _, expected = kd_and_grad(s, t)
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf * 1, t, inplace=True) * 3
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 3 * expected)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 6 * expected)


def leaf_that_is_a_view(x, t):
    memory = x * 1
    with torch.no_grad():
        view = memory.view(3, 9)
    return view.requires_grad_(), t


def retains_its_gradient(x, t):
    logits = x * 1
    logits.retain_grad()
    return logits, t


REFUSED = {
    "leaf": (lambda x, t: (x, t), "leaf"),
    "leaf that is a view of a result": (leaf_that_is_a_view, "leaf"),
    # torch cannot keep a gradient for a tensor that a function with several outputs overwrites: an internal assert.
    "retain_grad": (retains_its_gradient, "retain_grad"),
    "view of a part": (lambda x, t: ((x * 1)[:2], t[:2]), "view"),
    "columns of a part": (lambda x, t: ((x * 1)[:, :5], t[:, :5]), "view"),
    "transposed view": (lambda x, t: ((x.T * 1).T, t), "view"),
    "expanded": (lambda x, t: ((x * 1)[:1].expand(3, 9), t), "view|overlap"),
    "view of a leaf": (lambda x, t: (x.view(3, 9), t), "leaf|view"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(backend, what):
    make, message = REFUSED[what]
    x, t = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    student, teacher = make(x, t)
    before = student.detach().clone()
    with pytest.raises(ValueError, match=f"inplace=True.*({message})"):
        kd_loss(student, teacher, inplace=True)
    assert torch.equal(student.detach(), before)


def test_teacher_in_the_same_memory_is_refused(backend):
    logits = torch.randn(6, 9, requires_grad=True) * 1
    before = logits.detach().clone()
    for teacher in (logits.detach(), logits.detach()[:1].expand(6, 9)):
        with pytest.raises(ValueError, match=r"inplace=True.*teacher_logits shares its memory"):
            kd_loss(logits, teacher, inplace=True)
    assert torch.equal(logits.detach(), before)


# ------------------------------------------------------------------------------------------ version counters


def direct(s, t):
    return (s, t, None, None, None, None, [], 1.0, 0.0, 0.0, -100, False, s.shape[-1], "mean", True)


def test_kd_bumps_the_version_counter(backend):
    """Without it, autograd would use the overwritten tensor that it saved; opcheck does not see the difference."""
    x, t = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    logits = x * 1
    saved = logits.square().sum()  # keeps `logits` for backward
    version = logits._version
    torch.ops.fasttransfer.kd_(*direct(logits.detach(), t))
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_kd_scale_bumps_the_version_counter(backend):
    x = torch.randn(3, 9, requires_grad=True)
    grad = x * 1
    saved = grad.square().sum()
    version = grad._version
    torch.ops.fasttransfer.kd_scale_(grad.detach(), torch.tensor(2.0), torch.empty(0))
    assert grad._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()
