"""EMA against its formula, and against what AveragedModel, diffusers and timm do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasttransfer import EMA

SCHEDULES = {
    "none": {},
    "ratio": {"warmup": "ratio"},
    "power": {"warmup": "power", "inv_gamma": 2.0, "power": 0.7},
    "late": {"warmup": "power", "update_after_step": 3, "min_decay": 0.2},
}


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.tied = self.head
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.body(x))


def change(model):
    """One step of training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(p.device, p.dtype))
        bn = model.body[1]
        bn.running_mean.add_(1)
        bn.num_batches_tracked.add_(1)


def decay_of(n, decay, warmup="none", inv_gamma=1.0, power=2 / 3, min_decay=0.0, update_after_step=0):
    """From the docstring's table, n counted from 1."""
    s = n - update_after_step - 1
    if s <= 0:
        return 0.0
    d = {"none": decay, "ratio": (1 + s) / (10 + s), "power": 1 - (1 + s / inv_gamma) ** -power}[warmup]
    return max(min(decay, d), min_decay)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_average(backend, schedule, dtype, capturable):
    model = Net(dtype)
    ema = EMA(model, 0.9, capturable=capturable, **SCHEDULES[schedule])
    exact = {name: p.detach().double() for name, p in model.named_parameters()}
    for n in range(1, 8):
        change(model)
        ema.update(model)
        d = decay_of(n, 0.9, **SCHEDULES[schedule])
        assert ema.current_decay == pytest.approx(d, abs=1e-6)
        exact = {
            name: d * exact[name] + (1 - d) * p.detach().double() for name, p in model.named_parameters()
        }
    average = ema.average()
    for name, value in exact.items():
        assert average[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        bound = 1e-12 if dtype == torch.float64 else 1e-6
        assert (average[name].double() - value).norm() <= bound * value.norm()
    assert average["body.1.running_mean"].eq(7).all()
    assert average["body.1.num_batches_tracked"] == 7
    assert average["body.1.num_batches_tracked"].dtype == torch.int64
    assert "scratch" not in average


def test_an_average_of_16_bits_does_not_stand_still():
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.999, update_after_step=0)
    ema.update(model)
    nn.init.ones_(model.weight)
    for _ in range(5000):
        ema.update(model)
    assert ema.average()["weight"].item() == pytest.approx(1 - 0.999**5000, abs=1e-3)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_as_averaged_model(use_buffers):
    """Where it is right: fp32, one decay; with use_buffers the integer buffer is truncated there, copied here."""
    model = Net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    ours = EMA(model, 0.9, buffers="blend" if use_buffers else "copy")
    for _ in range(6):
        change(model)
        theirs.update_parameters(model)
        ours.update(model)
    average = ours.average()
    for name, value in {
        **dict(theirs.module.named_parameters()),
        **dict(theirs.module.named_buffers()),
    }.items():
        if name == "scratch" or name.startswith("tied") or (use_buffers and "num_batches" in name):
            continue
        torch.testing.assert_close(average[name], value.detach())
    assert average["body.1.num_batches_tracked"] == 6


def test_states_of_averaged_model():
    """Both ways: its state loads here, ours loads there."""
    model = Net()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    change(model)
    theirs.update_parameters(model)
    ours = EMA(model, 0.9)
    assert "module.tied.weight" in theirs.state_dict()  # tied tensors under each of their names
    ours.load_state_dict(theirs.state_dict())
    assert ours.n_averaged == 1
    for name, value in theirs.module.named_parameters():
        assert torch.equal(ours.average()[name], value)
    change(model)
    ours.update(model)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert all("tied" in key for key in missing.missing_keys)
    assert not missing.unexpected_keys
    assert torch.equal(theirs.module.head.weight, ours.average()["head.weight"])


def test_states_of_diffusers():
    """A list of parameters and a schedule; the dictionary has the keys of EMAModel.state_dict."""
    model = Net()
    ema = EMA(model, 0.95, warmup="power", inv_gamma=3.0, power=0.8, update_after_step=2, min_decay=0.1)
    for _ in range(5):
        change(model)
        ema.update(model)
    state = ema.diffusers_state_dict()
    assert [t.shape for t in state["shadow_params"]] == [p.shape for p in model.parameters()]
    other = EMA(Net(), 0.5)
    other.load_state_dict(copy.deepcopy(state))
    assert (other.decay, other.warmup, other.power, other.update_after_step) == (0.95, "power", 0.8, 2)
    assert other.current_decay == ema.current_decay
    for name, p in model.named_parameters():
        assert torch.equal(other.average()[name], ema.average()[name]), p.shape
    state["shadow_params"].pop()
    with pytest.raises(ValueError, match="shadow_params holds 5 tensors, the model has 6"):
        other.load_state_dict(state)
    before = {name: t.clone() for name, t in other.average().items()}
    good = EMA(Net(), 0.5, warmup="ratio").diffusers_state_dict()
    for change_of, error, words in (
        ({"shadow_params": None}, TypeError, "shadow_params must be a list of floating tensors"),
        ({"shadow_params": [t.int() for t in good["shadow_params"]]}, TypeError, "list of floating tensors"),
        ({"shadow_params": good["shadow_params"][::-1]}, ValueError, "shadow_params has"),
        ({"optimization_step": None}, TypeError, "optimization_step must be an integer"),
        ({"decay": 1.5}, ValueError, "decay must be between 0 and 1"),
        ({"min_decay": "0"}, TypeError, "min_decay must be"),
        ({"use_ema_warmup": 1}, TypeError, "use_ema_warmup must be True or False"),
    ):
        with pytest.raises(error, match=words):
            other.load_state_dict({**good, **change_of})
    with pytest.raises(TypeError, match="state_dict must be a state dict, got list"):
        other.load_state_dict([])
    with pytest.raises(ValueError, match="no optimization_step"):
        other.load_state_dict({"shadow_params": good["shadow_params"]})
    assert (other.decay, other.warmup, other.n_averaged) == (0.95, "power", 5)
    for name, value in before.items():
        assert torch.equal(other.average()[name], value)
    with pytest.raises(ValueError, match="cannot be told to diffusers"):
        EMA(model).diffusers_state_dict()


def test_applied_and_copied():
    model = Net(torch.bfloat16)
    ema = EMA(model, 0.9)
    for _ in range(3):
        change(model)
        ema.update(model)
    before = copy.deepcopy(model.state_dict())
    tensors = list(model.parameters())
    with ema.applied(model) as inside:
        assert inside is model
        for name, p in model.named_parameters():
            assert torch.equal(p, ema.average()[name].bfloat16())
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model):
        raise RuntimeError("inside")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(a is b for a, b in zip(tensors, model.parameters(), strict=True))
    ema.copy_to(model)
    assert torch.equal(model.head.weight, ema.average()["head.weight"].bfloat16())
    out = torch.func.functional_call(
        Net().eval(), {k: v for k, v in ema.average().items()}, torch.randn(2, 4)
    )
    assert out.shape == (2, 3)


def test_state_goes_through_files_and_copies(tmp_path):
    model = Net()
    ema = EMA(model, 0.9, warmup="ratio")
    change(model)
    ema.update(model)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = EMA(Net(), 0.9, warmup="ratio")
    other.load_state_dict(torch.load(tmp_path / "ema.pt"))
    for again in (other, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert again.n_averaged == 1
        for name, value in ema.average().items():
            assert torch.equal(again.average()[name], value)
    assert not list(ema.parameters())


def test_compiled():
    model = Net()
    ema, plain = EMA(model, 0.9, warmup="ratio", capturable=True), EMA(model, 0.9, warmup="ratio")
    step = torch.compile(ema.update)
    for _ in range(4):
        change(model)
        step(model)
        plain.update(model)
    for name, value in plain.average().items():
        torch.testing.assert_close(ema.average()[name], value)


def test_replaced_parameters_are_followed():
    model = Net()
    ema = EMA(model, 0.0)
    ema.update(model)
    model.head.weight = nn.Parameter(torch.full((3, 8), 2.0))
    ema.update(model)
    assert ema.average()["head.weight"].eq(2).all()


def test_errors():
    model = Net()
    ema = EMA(model)
    before = {name: t.clone() for name, t in ema.average().items()}
    change(model)
    wrong = Net()
    wrong.head = wrong.tied = nn.Linear(8, 1)
    for other, words in (
        (
            nn.Linear(2, 2),
            "model must have the names of the average: it lacks 'body.0.weight'; it also has 'weight'",
        ),
        (wrong, r"model's 'head.weight' has shape \[1, 8\], the average \[3, 8\]"),
    ):
        for call in (ema.update, ema.copy_to, lambda m: ema.applied(m).__enter__()):
            with pytest.raises(ValueError, match=words):
                call(other)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        ema.update(dict(model.named_parameters()))
    assert ema.n_averaged == 0
    for name, value in before.items():
        assert torch.equal(ema.average()[name], value)
    for options, error, words in (
        ({"decay": 1.5}, ValueError, "decay must be between 0 and 1"),
        ({"warmup": "linear"}, ValueError, "warmup must be one of 'none', 'ratio', 'power'"),
        ({"power": 0}, ValueError, "power must be greater than 0"),
        ({"update_after_step": 1.0}, TypeError, "update_after_step must be an integer"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float32"),
        ({"buffers": "keep"}, ValueError, "buffers must be one of"),
        ({"device": "gpu"}, ValueError, "device must name a device, got 'gpu'"),
        ({"device": "meta"}, ValueError, "device must be a device that holds values"),
    ):
        with pytest.raises(error, match=words):
            EMA(model, **options)
    with pytest.raises(ValueError, match="no floating tensors"):
        EMA(nn.ReLU())


def test_layers_that_are_replaced():
    """The average follows the model's present layers, or says that it cannot."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    ema = EMA(model, 0.0)
    ema.update(model)
    model[2] = nn.Linear(3, 2)
    ema.update(model)
    assert torch.equal(ema.average()["2.weight"], model[2].weight)
    own = model[2].weight.detach().clone()
    with torch.no_grad():
        ema.average()["2.weight"].zero_()
    with ema.applied(model):
        assert not model[2].weight.any()
    assert torch.equal(model[2].weight, own)
    model[2].bias = None
    with pytest.raises(ValueError, match=r"lacks '2\.bias'"):
        ema.update(model)
    model[2] = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"model's '2.weight' has shape \[4, 3\]"):
        ema.update(model)
    model[2] = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"also has '2\.0\.weight'"):
        ema.update(model)
