"""kd_loss inside autograd: upstream gradients, graphs that run twice, checkpointing, and what it refuses."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import kd_and_grad


@pytest.fixture
def batch():
    """4 rows of 30 logits, student, teacher and labels with one row ignored."""
    return torch.randn(4, 30), torch.randn(4, 30), torch.tensor([3, -100, 0, 29])


OPTIONS = [
    {},
    {"temperature": 3.0},
    {"temperature": torch.tensor([1.0, 2.0, 0.5, 4.0], dtype=torch.float64)},
    {"label_weight": 0.3, "temperature": 2.0},
    {"label_weight": 0.3, "label_smoothing": 0.2, "ignored_rows": "distill"},
    {"label_weight": 1.0},
    {"vocab_size": 20, "row_weight": torch.tensor([1.0, 0.0, 2.5, 0.3], dtype=torch.float64)},
]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
def test_gradcheck(backend, batch, options, reduction):
    """Against finite differences of the loss itself: nothing of the formula is assumed."""
    s, t, labels = batch
    labels = labels.clamp(max=19) if "label_weight" in options else None
    s, t = s.double().requires_grad_(), t.double()
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, t, labels, reduction=reduction, **options), (s,))
    assert torch.autograd.gradcheck(
        lambda x: kd_loss(x * 1, t, labels, reduction=reduction, inplace=True, **options), (s,)
    )


# ----------------------------------------------------------------------------------------- upstream gradients


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [3.0, -0.5, 0.0, 1.0])
def test_upstream_number(backend, batch, upstream, dtype):
    s, t, labels = batch
    s, t = s.to(dtype), t.to(dtype)
    _, exact = oracle.kd(s, t, labels, label_weight=0.3, temperature=2.0)
    leaf = s.clone().requires_grad_()
    (kd_loss(leaf, t, labels, label_weight=0.3, temperature=2.0) * upstream).backward()
    # 16 bits: the stored gradient is rounded once, its product with the upstream number once more.
    again = oracle.TOLERANCES[dtype].roundoff
    error = (leaf.grad.double() - exact * upstream).norm() / exact.norm()
    assert error <= abs(upstream) * (oracle.TOLERANCES[dtype].relative + 2 * again)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_upstream_per_row(backend, batch, dtype):
    s, t, _ = batch
    s, t = s.to(dtype), t.to(dtype)
    upstream = torch.tensor([1.0, 4.0, -2.0, 0.0])  # exact factors: 16 bits are rounded once
    _, exact = oracle.kd(s, t, temperature=2.0, reduction="none")
    leaf = s.clone().requires_grad_()
    kd_loss(leaf, t, temperature=2.0, reduction="none").backward(upstream)
    oracle.assert_norm_close(leaf.grad, exact * upstream[:, None])
    assert not leaf.grad[3].any()


def test_upstream_per_row_of_strided_memory(backend):
    """Losses [B, S], weighed by a tensor that is transposed, and by an expanded one."""
    s, t = torch.randn(3, 5, 20), torch.randn(3, 5, 20)
    _, exact = oracle.kd(s, t, reduction="none")
    for upstream in (torch.randn(5, 3).T, torch.randn(3, 1).expand(3, 5)):
        leaf = s.clone().requires_grad_()
        kd_loss(leaf, t, reduction="none").backward(upstream)
        oracle.assert_norm_close(leaf.grad, exact * upstream[..., None])


def test_loss_among_other_losses(backend, batch):
    s, t, labels = batch
    leaf = s.clone().requires_grad_()
    loss = (
        0.25 * kd_loss(leaf, t, temperature=2.0)
        + leaf.square().sum()
        + 3 * kd_loss(leaf, t, labels, label_weight=1.0)
    )
    loss.backward()
    soft = oracle.kd(s, t, temperature=2.0)[1]
    hard = oracle.kd(s, t, labels, label_weight=1.0)[1]
    oracle.assert_norm_close(leaf.grad, 0.25 * soft + 2 * s.double() + 3 * hard)


def test_gradients_accumulate(backend, batch):
    s, t, _ = batch
    _, grad = kd_and_grad(s, t)
    leaf = s.clone().requires_grad_()
    leaf.grad = torch.ones_like(s)
    for calls in (1, 2, 3):
        kd_loss(leaf, t).backward()
        torch.testing.assert_close(leaf.grad, 1 + calls * grad)


def test_loss_that_is_not_used_has_no_gradient(backend, batch):
    """Upstream None: the loss is an output of a graph whose other outputs are differentiated."""
    s, t, _ = batch
    leaf = s.clone().requires_grad_()
    logits = leaf * 1
    kd_loss(logits, t)
    logits.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(s))
    assert torch.autograd.grad(kd_loss(leaf, t) * 0 + leaf.sum(), leaf)[0].eq(1).all()


# --------------------------------------------------------------------------------------------- graphs run twice


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_is_not_scaled_twice(backend, batch, reduction, dtype):
    s, t, _ = batch
    leaf = s.to(dtype).requires_grad_()
    loss = 3 * kd_loss(leaf, t.to(dtype), temperature=2.0, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (third,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, kept), "a gradient that was handed out has changed"
    assert torch.equal(second, kept)
    assert torch.equal(third, kept)
    _, exact = oracle.kd(leaf, t.to(dtype), temperature=2.0, reduction=reduction)
    error = (kept.double() - 3 * exact).norm() / (3 * exact).norm()
    assert error <= oracle.TOLERANCES[dtype].relative + 2 * oracle.TOLERANCES[dtype].roundoff


def test_backward_after_the_graph_is_freed_is_torchs_error(backend, batch):
    s, t, _ = batch
    loss = kd_loss(s.requires_grad_(), t)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_different_upstream_in_each_backward(backend, batch):
    s, t, _ = batch
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf, t)
    _, grad = kd_and_grad(s, t)
    for upstream in (2.0, 1.0, -3.0):
        (scaled,) = torch.autograd.grad(loss, leaf, torch.tensor(upstream), retain_graph=True)
        torch.testing.assert_close(scaled, upstream * grad)


def test_handed_out_gradient_is_the_callers(backend, batch):
    """Changing .grad after a backward with retain_graph must not change what the graph gives next."""
    s, t, _ = batch
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf, t)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], kept)


@pytest.mark.parametrize("inplace", [False, True])
def test_create_graph_is_a_clear_error(backend, batch, inplace):
    s, t, _ = batch
    leaf = s.clone().requires_grad_()
    loss = kd_loss(leaf * 1, t, inplace=inplace)
    with pytest.raises(RuntimeError, match=r"kd_loss has no second derivative.*create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_gradients_of_a_batch_of_upstreams_are_right_or_refused(backend, batch):
    """is_grads_batched and vectorize=True run one backward under vmap."""
    s, t, _ = batch
    leaf = s.clone().requires_grad_()
    losses = kd_loss(leaf, t, reduction="none")
    _, exact = oracle.kd(s, t, reduction="none")
    try:
        (rows,) = torch.autograd.grad(losses, leaf, torch.eye(4), is_grads_batched=True)
    except RuntimeError as error:
        assert "atching rule" in str(error)  # noqa: PT017
    else:
        for i in range(4):
            oracle.assert_norm_close(rows[i, i], exact[i])


def test_jacobian(backend, batch):
    s, t, _ = batch
    jacobian = torch.autograd.functional.jacobian(lambda x: kd_loss(x, t, reduction="none"), s)
    _, exact = oracle.kd(s, t, reduction="none")
    for i in range(4):
        oracle.assert_norm_close(jacobian[i, i], exact[i])
        assert jacobian[i].count_nonzero() == jacobian[i, i].count_nonzero()


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop", "ignore:.*autograd kernel was not registered"
)
def test_vmap_is_right_or_refused(backend, batch):
    """Also where the gradient is taken outside of vmap: not None without a word."""
    s, t, _ = batch
    exact_loss, exact = oracle.kd(s, t, reduction="none")
    losses = torch.vmap(lambda x, y: kd_loss(x, y))(s, t)
    oracle.assert_norm_close(losses, exact_loss)
    leaf = s.clone().requires_grad_()
    try:
        torch.vmap(lambda x, y: kd_loss(x, y))(leaf, t).sum().backward()
    except RuntimeError:
        assert leaf.grad is None
    else:
        assert leaf.grad is not None, "the gradient was dropped"
        oracle.assert_norm_close(leaf.grad, exact)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on the first use of jvp
def test_forward_mode_is_refused(backend, batch):
    """No tangent of 0 without a word."""
    s, t, _ = batch
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: kd_loss(x, t), (s,), (torch.ones_like(s),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, torch.ones_like(s))
        with pytest.raises((RuntimeError, NotImplementedError)):
            kd_loss(dual, t)


# ------------------------------------------------------------------------------------------------ surroundings


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend, batch, reentrant, inplace):
    s, t, labels = batch
    head = torch.nn.Linear(30, 30)
    plain = kd_loss(head(s), t, labels, label_weight=0.5, temperature=2.0)
    expected = torch.autograd.grad(3 * plain, tuple(head.parameters()))
    x = s.clone().requires_grad_()

    def loss(x):
        return kd_loss(head(x), t, labels, label_weight=0.5, temperature=2.0, inplace=inplace)

    checkpointed = checkpoint(loss, x, use_reentrant=reentrant)
    (3 * checkpointed).backward()
    assert torch.equal(checkpointed, plain)
    for parameter, grad in zip(head.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_evaluation_keeps_no_graph_and_no_gradient(backend, batch):
    s, t, _ = batch
    expected = kd_loss(s, t)
    assert not expected.requires_grad
    leaf = s.clone().requires_grad_()
    with torch.no_grad():
        loss = kd_loss(leaf, t)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    with torch.inference_mode():
        loss = kd_loss(leaf, t)
        assert torch.equal(loss, expected)
        assert torch.equal(kd_loss(s.clone(), t.clone()), expected)


def test_inference_tensors_as_constants(backend, batch):
    """A teacher evaluated in inference mode beside a student that is trained."""
    s, t, labels = batch
    expected = kd_and_grad(s, t, labels, label_weight=0.5)
    with torch.inference_mode():
        frozen, weight = t.clone(), torch.ones(4)
    loss, grad = kd_and_grad(s, frozen, labels, label_weight=0.5, row_weight=weight)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


def test_teacher_gets_a_gradient_where_it_requires_one(backend, batch):
    s, t, _ = batch
    expected = kd_and_grad(s, t)
    s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
    loss = kd_loss(s, t)
    loss.backward()
    oracle.assert_norm_close(loss, expected[0])
    oracle.assert_norm_close(s.grad, expected[1])
    assert t.grad.isfinite().all()
    assert t.grad.any()
    with torch.no_grad():
        assert not kd_loss(s, t).requires_grad


def test_hooks_see_the_gradient(backend, batch):
    s, t, _ = batch
    leaf, seen = s.clone().requires_grad_(), []
    leaf.register_hook(lambda grad: seen.append(grad.clone()) or grad * 2)
    kd_loss(leaf, t).backward()
    _, grad = kd_and_grad(s, t)
    assert torch.equal(seen[0], grad)
    assert torch.equal(leaf.grad, 2 * grad)


def test_saved_tensors_hooks(backend, batch):
    """Offloading what autograd saves: the gradient is what is saved, and comes back from wherever it was."""
    s, t, _ = batch
    expected = kd_and_grad(s, t)
    leaf, packed = s.clone().requires_grad_(), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = kd_loss(leaf, t)
    loss.backward()
    assert s.shape in packed
    assert torch.equal(leaf.grad, expected[1])
