"""L2SP: its start points, and what is penalised with which strength."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fasttransfer import L2SP, l2sp_penalty, replace_head
from tests.nets import Net, count, move, tied

# ---------------------------------------------------------------------------------------------- start points


def test_snapshot_is_a_clone(backend):
    """0 now, and not 0 after a step: a start point that aliases its parameter gives 0 for ever."""
    model = Net()
    reg = L2SP(model, 0.1)
    assert reg().item() == 0
    model(torch.randn(8, 4)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert reg().item() > 0
    move(model)
    assert reg().item() > 0.1 * 0.1 * count(model)


def test_start_given_as_state_dict_is_a_clone_too(backend):
    model, pretrained = Net(), Net()
    model.load_state_dict(pretrained.state_dict())
    reg = L2SP(model, 0.1, start=pretrained.state_dict())
    move(pretrained)
    assert reg().item() == 0


@pytest.mark.parametrize("form", ["state_dict", "module", "own state_dict"])
def test_start_forms(backend, form):
    model, pretrained = Net(), Net()
    start = {
        "state_dict": pretrained.state_dict(),
        "module": pretrained,
        "own state_dict": {**pretrained.state_dict(), "extra": 3, "other": torch.zeros(2)},
    }[form]
    reg = L2SP(model, 0.3, start=start)
    assert torch.equal(reg(), l2sp_penalty(model, pretrained, 0.3))
    assert reg.new_names == ()


def test_replaced_head_is_new(backend):
    """Another shape, or missing: no start point, pulled towards 0 with new_strength."""
    model, pretrained = Net(classes=7), Net(classes=3)
    names = ("head.weight", "head.bias")
    reg = L2SP(model, 0.3, start=pretrained.state_dict(), new_strength=0.2)
    assert reg.new_names == names
    expected = 0.3 * sum(
        (p - q).detach().double().square().sum()
        for p, q in zip(model.backbone.parameters(), pretrained.backbone.parameters(), strict=True)
    ) + 0.2 * sum(p.detach().double().square().sum() for p in model.head.parameters())
    torch.testing.assert_close(reg().double(), expected, rtol=2e-6, atol=0)
    reg().backward()
    torch.testing.assert_close(model.head.weight.grad, 0.4 * model.head.weight.detach())
    assert set(reg.distance()) == {name for name, _ in model.named_parameters()} - set(names)
    model.head.weight.grad = None
    reg.prox_(lr=0.5)  # h = 2 * 0.5 * 0.2 on new parameters
    missing = {name: t for name, t in pretrained.state_dict().items() if not name.startswith("head")}
    assert L2SP(model, 0.3, start=missing).new_names == names


def test_prox_with_a_new_head(backend):
    model, pretrained = Net(classes=7), Net(classes=3)
    reg = L2SP(model, 0.3, start=pretrained, new_strength=0.2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reg.prox_(lr=0.5)
    torch.testing.assert_close(model.head.weight.detach(), before["head.weight"] / (1 + 2 * 0.5 * 0.2))
    h = 2 * 0.5 * 0.3
    moved = (before["backbone.0.weight"] + h * pretrained.backbone[0].weight.detach()) / (1 + h)
    torch.testing.assert_close(model.backbone[0].weight.detach(), moved)


def test_new_parameters_are_left_alone_by_default(backend):
    model, pretrained = Net(classes=7), Net(classes=3)
    reg = L2SP(model, 0.3, start=pretrained)
    before = model.head.weight.detach().clone()
    reg().backward()
    reg.prox_(lr=1.0)
    assert model.head.weight.grad is None
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("start", [None, "state_dict", "module"])
@pytest.mark.parametrize("form", ["dict", "names", "pattern", "one name each"])
def test_new_parameters_of_the_old_shape(backend, start, form):
    """A head for as many classes as before, and a snapshot: the start has points under their names."""
    model, pretrained = Net(), Net()
    model.backbone.load_state_dict(pretrained.backbone.state_dict())
    head = replace_head(model, 3)
    new = {
        "dict": head,
        "names": list(head),
        "pattern": "head.*",
        "one name each": ("*d.weight", "head.bias"),
    }
    given = {None: None, "state_dict": pretrained.state_dict(), "module": pretrained}[start]
    reg = L2SP(model, 0.3, start=given, new=new[form], new_strength=0.2)
    assert reg.new_names == ("head.weight", "head.bias")
    assert set(reg.distance()) == {name for name, _ in model.backbone.named_parameters(prefix="backbone")}
    expected = 0.2 * sum(p.detach().double().square().sum() for p in model.head.parameters())
    torch.testing.assert_close(reg().double(), expected, rtol=2e-6, atol=0)
    move(model.backbone, 1.0)
    torch.testing.assert_close(reg().double(), expected + 0.3 * count(model.backbone), rtol=2e-6, atol=0)


def test_new_beside_include_exclude_and_ties(backend):
    model = tied()
    assert L2SP(model, 0.3, new="1.weight").new_names == ("0.weight",)
    model = Net()
    assert L2SP(model, 0.3, new="*", include="head.*").new_names == ("head.weight", "head.bias")
    assert L2SP(model, 0.3, new="head.*", exclude="head.bias").new_names == ("head.weight",)


def test_everything_may_be_new(backend):
    """Weight decay, and no start points; a start that shares nothing with what is not new stays an error."""
    model = Net()
    reg = L2SP(model, 0.3, start={}, new="*", new_strength=0.2)
    expected = 0.2 * sum(p.detach().double().square().sum() for p in model.parameters())
    torch.testing.assert_close(reg().double(), expected, rtol=2e-6, atol=0)
    assert reg.state_dict() == {}
    with pytest.raises(ValueError, match="start shares no parameter"):
        L2SP(model, 0.3, start={"head.weight": model.head.weight}, new="head.*")


@pytest.mark.parametrize("start", [None, "state_dict", "module"])
def test_start_is_in_the_state_dict(backend, start):
    model, pretrained = Net(), Net()
    given = {None: None, "state_dict": pretrained.state_dict(), "module": pretrained}[start]
    reg = L2SP(model, 0.3, start=given)
    assert set(reg.state_dict()) == {"start." + name for name, _ in model.named_parameters()}
    saved = copy.deepcopy(reg.state_dict())
    move(model)
    resumed = L2SP(model, 0.3)
    assert resumed().item() == 0
    resumed.load_state_dict(saved, strict=True)
    assert torch.equal(resumed(), reg())
    with pytest.raises(RuntimeError, match=r"start\.head\.bias"):
        resumed.load_state_dict({k: v for k, v in saved.items() if k != "start.head.bias"})


def test_deep_names_and_parameter_containers(backend):
    class Odd(nn.Module):
        """Names that could meet attributes of L2SP or of nn.Module."""

        def __init__(self):
            super().__init__()
            self.start = nn.ModuleDict({"layer": nn.Sequential(nn.Linear(2, 2))})
            self.strength = nn.Parameter(torch.ones(2))
            self.points = nn.ParameterList([torch.ones(1), torch.ones(3)])
            self._names = nn.ParameterDict({"weight": torch.ones(2), "0": torch.ones(1)})

    model = Odd()
    reg = L2SP(model, 1.0)
    assert set(reg.state_dict()) == {"start." + name for name, _ in model.named_parameters()}
    assert set(reg.start.tensors()) == {name for name, _ in model.named_parameters()}
    reg.load_state_dict(reg.state_dict())
    move(model, 1.0)
    assert reg().item() == count(model)


# --------------------------------------------------------------------------------------------- what is penalised


ALL = [f"backbone.{i}.{kind}" for i in ("0", "1.0", "1.1") for kind in ("weight", "bias")]
ALL += ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, ALL),
        ({"include": "backbone.*"}, ALL[:6]),
        ({"include": ["head.weight", "backbone.0.*"]}, [*ALL[:2], "head.weight"]),
        ({"exclude": "*.bias"}, ALL[::2]),
        ({"include": "*.weight", "exclude": ("backbone.1.0.*", "head.*")}, [ALL[0], ALL[4]]),
    ],
)
def test_include_and_exclude(backend, options, names):
    model = Net()
    reg = L2SP(model, 0.5, **options)
    assert set(reg.distance()) == set(names)
    move(model)
    reg.add_grad_()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(names)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    reg.prox_(1.0)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == set(names)


@pytest.mark.parametrize("argument", ["include", "exclude", "new"])
@pytest.mark.parametrize("patterns", ["backbone", ["head.*", "backbonne.*"], "running_mean"])
def test_a_pattern_that_matches_nothing(argument, patterns):
    with pytest.raises(ValueError, match=f"{argument}.*matches none"):
        L2SP(Net(), 0.5, **{argument: patterns})


def test_frozen_parameters_are_skipped_at_the_time_of_the_call(backend):
    model = Net()
    reg = L2SP(model, 0.5)
    move(model, 1.0)
    everything = reg().item()
    model.backbone.requires_grad_(False)
    assert abs(reg().item() - 0.5 * count(model.head)) <= 1e-5
    reg.add_grad_()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "head.weight",
        "head.bias",
    ]
    before = model.backbone[0].weight.clone()
    reg.prox_(1.0)
    assert torch.equal(model.backbone[0].weight, before)
    assert set(reg.distance()) == {name for name, _ in model.named_parameters()}
    model.backbone.requires_grad_(True)
    move(model.head, 0.5)  # what prox_ took from the distance of 1: h = 1
    torch.testing.assert_close(reg(), torch.tensor(everything))


def test_everything_frozen(backend):
    model = Net().requires_grad_(False)
    reg = L2SP(model, 0.5)
    assert reg().item() == 0
    assert reg.add_grad_().item() == 0
    reg.prox_(1.0)


def test_tied_weights_count_once(backend):
    model = tied()
    reg = L2SP(model, 0.5)
    move(model, 1.0)
    assert reg().item() == 6
    reg.add_grad_()
    torch.testing.assert_close(model[0].weight.grad, torch.ones(4, 3))
    assert list(reg.state_dict()) == ["start.0.weight"]


@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
def test_tied_weights_under_either_name(name):
    """A checkpoint that keeps one of the names (as safetensors does), and patterns."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    start = {name: model[0].weight.detach() - 1, "1.bias": model[1].bias.detach()}
    reg = L2SP(model, 0.5, start=start)
    assert reg.new_names == ()
    assert abs(reg().item() - 6) <= 1e-5
    assert set(L2SP(model, 0.5, exclude=name).distance()) == {"1.bias"}
    assert set(L2SP(model, 0.5, include=name).distance()) == {"0.weight"}


def test_recurrent_and_parametrized_models(backend):
    for model in (
        nn.GRU(3, 4, num_layers=2, bidirectional=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    ):
        reg = L2SP(model, 0.5)
        move(model, 1.0)
        torch.testing.assert_close(reg(), torch.tensor(0.5 * count(model)))
        model(torch.randn(5, 2, 3))[0].sum().backward()
        reg.add_grad_()
        reg.load_state_dict(reg.state_dict())


# --------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"strength": -1.0}, ValueError, ["strength", "-1"]),
        ({"strength": "a"}, TypeError, ["strength"]),
        ({"new_strength": -1.0}, ValueError, ["new_strength"]),
        ({"start": [torch.zeros(1)]}, TypeError, ["start", "list"]),
        (
            {"start": {"module.head.weight": torch.zeros(3, 5)}},
            ValueError,
            ["backbone.0.weight", "module.head"],
        ),
        ({"start": nn.ReLU()}, ValueError, ["start"]),
        ({"start": {"head.bias": torch.zeros(3).int()}}, TypeError, ["head.bias", "int32"]),
        ({"include": 3}, TypeError, ["include"]),
        ({"include": []}, ValueError, ["include"]),
        ({"include": "head.*", "exclude": "head.*"}, ValueError, ["include", "exclude"]),
        ({"model": [torch.zeros(1)]}, TypeError, ["model", "list"]),
        ({"model": nn.ReLU()}, ValueError, ["model"]),
    ],
)
def test_errors(options, kind, words):
    arguments = {"model": Net(), "strength": 0.1, **options}
    with pytest.raises(kind) as caught:
        L2SP(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_prox_with_a_bad_lr():
    with pytest.raises(ValueError, match="lr must be"):
        L2SP(Net(), 0.1).prox_(-1.0)


def test_the_error_names_the_parameter_with_the_bad_gradient():
    model = Net()
    reg = L2SP(model, 0.1)
    model.backbone.requires_grad_(False)
    model.head.bias.grad = torch.zeros(1).expand(3)
    with pytest.raises(ValueError, match=r"head\.bias"):
        reg.add_grad_()


def test_frozen_integer_parameters_do_not_stand_in_the_way(backend):
    """A quantised backbone: it cannot be trained, so it is not penalised."""
    model = nn.Linear(2, 2)
    model.quantised = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    reg = L2SP(model, 1.0)
    with torch.no_grad():
        model.weight.add_(1)
    assert abs(reg().item() - 4) <= 1e-5
