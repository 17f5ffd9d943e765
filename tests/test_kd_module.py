"""KDLoss: the options once, the tensors per batch; a module like any other."""

import copy
import io
import pickle

import pytest
import torch

from fasttransfer import DecoupledKDLoss, KDLoss, LinearKDLoss, TopKKDLoss, kd_loss


@pytest.fixture
def batch():
    labels = torch.tensor([0, -100, 5, 8])
    return torch.randn(4, 9), torch.randn(4, 9), labels


OPTIONS = {
    "defaults": {},
    "temperature": {"temperature": 3.0},
    "labels": {"label_weight": 0.3, "label_smoothing": 0.1},
    "ignore_index": {"label_weight": 0.3, "ignore_index": 5, "ignored_rows": "distill"},
    "vocab_size": {"vocab_size": 6},
    "reduction": {"reduction": "sum", "scale_by_t2": False, "temperature": 2.0},
    "none": {"reduction": "none"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_is_the_function(backend, batch, case):
    options = OPTIONS[case]
    s, t, labels = batch
    tensors = (s, t)
    if "label_weight" in options:
        tensors += (labels.clamp(min=0) if "ignore_index" in options else labels,)
    assert torch.equal(KDLoss(**options)(*tensors), kd_loss(*tensors, **options))


def test_per_batch_arguments(backend, batch):
    s, t, labels = batch
    criterion = KDLoss(temperature=2.0, label_weight=0.5)
    per_batch = {
        "temperature": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "row_weight": torch.rand(4),
        "num_items": 7,
    }
    assert torch.equal(
        criterion(s, t, labels, **per_batch), kd_loss(s, t, labels, label_weight=0.5, **per_batch)
    )
    expected = kd_loss(s, t, labels, temperature=2.0, label_weight=0.5)
    assert torch.equal(criterion(s, t, labels), expected), "a temperature for one batch stays with it"


def test_inplace_is_an_option(batch):
    s, t, _ = batch
    logits = s.requires_grad_() * 1
    KDLoss(inplace=True)(logits, t).backward()
    assert torch.equal(logits.detach(), s.grad)


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(KDLoss()) == "KDLoss(temperature=1.0)"
    shown = repr(
        KDLoss(temperature=4, label_weight=0.5, ignored_rows="distill", vocab_size=100, reduction="sum")
    )
    for text in ("temperature=4.0", "label_weight=0.5", "vocab_size=100", "reduction='sum'"):
        assert text in shown
    assert "distill" in shown
    assert "smoothing" not in shown
    assert "label_weight=0.0" in repr(KDLoss(label_weight=0.0)), "0.0 is not the default: it asks for labels"


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(batch, copied):
    s, t, labels = batch
    criterion = KDLoss(temperature=3.0, label_weight=0.3, label_smoothing=0.1, ignored_rows="distill")
    assert repr(copied(criterion)) == repr(criterion)
    assert torch.equal(copied(criterion)(s, t, labels), criterion(s, t, labels))


def test_what_no_call_could_take_is_refused_when_it_is_made():
    for make in (KDLoss, TopKKDLoss, LinearKDLoss):
        with pytest.raises(ValueError, match="vocab_size must be at least 2, got 1"):
            make(vocab_size=1)
    with pytest.raises(TypeError, match="label_weight must be a number"):
        DecoupledKDLoss(label_weight=None)


def test_saved_with_a_model(batch):
    """Nothing in the state_dict: a checkpoint without the loss loads into a model with it."""
    s, t, labels = batch
    model = torch.nn.ModuleDict(
        {"head": torch.nn.Linear(9, 9), "criterion": KDLoss(temperature=3.0, label_weight=0.3)}
    )
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    assert not list(KDLoss().parameters())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded["criterion"](s, t, labels), model["criterion"](s, t, labels))


def test_moves_like_a_module(batch):
    s, t, _ = batch
    criterion = KDLoss(temperature=3.0)
    expected = criterion(s, t)
    moved = criterion.to(torch.float64).train().eval().requires_grad_(False)
    assert torch.equal(moved(s, t), expected)
