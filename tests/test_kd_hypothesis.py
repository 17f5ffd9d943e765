"""kd_loss against the oracle on shapes and options that nobody chose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttransfer import kd_loss
from tests import oracle
from tests.kd_calls import kd_and_grad

# Short rows of every length up to four vectors of the widest level (16) and a rest, and some around a block (2048).
WIDTHS = st.one_of(st.integers(2, 70), st.sampled_from([127, 128, 2047, 2048, 2050, 4100]))
EXTREMES = st.sampled_from(["none", "-inf", "large", "one-hot", "equal"])


@st.composite
def calls(draw):
    """Arguments of a call that is right, as (student, teacher, labels, options)."""
    leading = draw(st.lists(st.integers(0, 4), max_size=3))
    columns = draw(WIDTHS)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    dtypes = st.sampled_from(oracle.DTYPES)
    s, t = (scale * torch.randn(*leading, columns + extra) for extra in padding)
    extreme = draw(EXTREMES)
    if extreme == "-inf":  # of both sides the same, and never all of a row
        masked = torch.rand(columns) < 0.4
        masked[draw(st.integers(0, columns - 1))] = False
        s[..., :columns][..., masked] = -torch.inf
        t[..., :columns][..., masked] = -torch.inf
    elif extreme == "large":
        s, t = s.mul(1e3).clamp(-1e4, 1e4), t.mul(1e3).clamp(-1e4, 1e4)
    elif extreme == "one-hot":
        t = torch.where(t == t[..., :columns].amax(-1, keepdim=True), 0.0, -torch.inf)
    elif extreme == "equal":
        t = torch.nn.functional.pad(s[..., :columns], (0, padding[1]))
    s, t = s.to(draw(dtypes)), t.to(draw(dtypes))
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"] + ["batchmean"] * bool(leading))),
        "scale_by_t2": draw(st.booleans()),
    }
    if any(padding) or draw(st.booleans()):
        options["vocab_size"] = columns
    if draw(st.booleans()):
        options["temperature"] = 0.5 + 7.5 * torch.rand(leading)
    else:
        options["temperature"] = draw(st.sampled_from([0.5, 1.0, 2.0, 8.0]))
    if draw(st.booleans()):
        options["row_weight"] = torch.rand(leading) * (torch.rand(leading) < 0.8)
    labels = None
    if draw(st.booleans()):
        allowed = (s[..., :columns] > -torch.inf).reshape(-1, columns).all(0).nonzero()[:, 0]
        if extreme == "one-hot":
            allowed = torch.arange(columns)
        labels = (
            allowed[torch.randint(max(1, len(allowed)), leading)]
            if len(allowed)
            else torch.zeros(leading).long()
        )
        labels = torch.where(torch.rand(leading) < 0.3, -100, labels)
        options["label_weight"] = draw(st.sampled_from([0.0, 0.3, 1.0]))
        options["ignored_rows"] = draw(st.sampled_from(["skip", "distill"]))
        if extreme != "-inf":  # smoothing over a mask is +inf: tests/test_kd_special.py
            options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    return s, t, labels, options


def assert_within(actual, exact, allowed, what):
    error = (actual.double() - exact).norm().item()
    assert error <= allowed, f"{what} is off by {error:.2e}, allowed {allowed:.2e}"


@settings(max_examples=120)
@given(call=calls())
def test_any_call_agrees_with_the_oracle(backend, call):
    s, t, labels, options = call
    loss, grad = kd_and_grad(s, t, labels, **options)
    exact_loss, exact_grad = oracle.kd(s, t, labels, **options)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    # The bounds of tests/test_kd.py, both kinds added: generated rows are independent, or nearly agree by chance.
    relative = 1e-12 if torch.float64 in (s.dtype, t.dtype) else 2e-6
    rows = s.shape[:-1].numel()
    temperature = max(1.0, torch.as_tensor(options["temperature"]).max().item()) if rows else 1.0
    assert_within(
        loss, exact_loss, relative * (exact_loss.norm().item() + 0.05 * temperature**2 * rows), "loss"
    )
    rounding = (exact_grad.to(s.dtype).double() - exact_grad).norm().item()
    near = relative * temperature * rows**0.5
    assert_within(grad, exact_grad, relative * exact_grad.norm().item() + 1.05 * rounding + near, "gradient")


@settings(max_examples=60)
@given(call=calls(), seed=st.integers(0, 2**16))
def test_invariances(backend, call, seed):
    """What must not change the loss: a constant added to a row (of either side), the order of the columns."""
    s, t, labels, options = call
    s, t = s.double(), t.double()
    loss = kd_loss(s, t, labels, **options)
    shift = torch.randint(-50, 50, s.shape[:-1])[..., None].double()
    shifted = kd_loss(s + shift, t - 2 * shift, labels, **options)
    torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)
    columns = options.get("vocab_size", s.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(columns, generator=generator)
    place = torch.empty_like(order)
    place[order] = torch.arange(columns)
    moved = None if labels is None else torch.where(labels == -100, -100, place[labels.clamp(min=0)])
    permuted = kd_loss(s[..., order], t[..., order], moved, **{**options, "vocab_size": None})
    torch.testing.assert_close(permuted, loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 5])
@settings(max_examples=60)
@given(columns=st.integers(2, 5000), temperature=st.sampled_from([0.5, 1.0, 4.0]), seed=st.integers(0, 2**16))
def test_signs_and_sums(backend, rows, columns, temperature, seed):
    """KL is not negative, and a gradient of softmax sums to 0 over the vocabulary."""
    torch.manual_seed(seed)
    s, t = 5 * torch.randn(rows, columns), 5 * torch.randn(rows, columns)
    loss, grad = kd_and_grad(s, t, temperature=temperature, reduction="none")
    assert (loss >= -1e-7 * temperature**2).all()
    assert (grad.double().sum(-1).abs() <= 2e-6 * temperature).all()
