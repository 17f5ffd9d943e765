"""L2SP: its forms in a training step, and life as a module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from fasttransfer import L2SP, l2sp_add_grad_, l2sp_prox_
from tests.nets import Net, count, move

# --------------------------------------------------------------------------------------------- forms and steps


def test_backward_and_add_grad_are_the_same(backend):
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    models = [Net(), Net(), Net()]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    regs = [L2SP(model, 0.3) for model in models]
    start = [p.detach().clone() for p in models[0].parameters()]
    for model in models:
        move(model)
    values = []
    for i, (model, reg) in enumerate(zip(models, regs, strict=True)):
        loss = nn.functional.cross_entropy(model(x), y)
        if i == 0:
            values.append(reg())
            (loss + values[0]).backward()
        else:
            loss.backward()
            values.append(reg.add_grad_() if i == 1 else l2sp_add_grad_(model.parameters(), start, 0.3))
    for value, model in zip(values[1:], models[1:], strict=True):
        assert torch.equal(values[0], value)
        for p, q in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-7)


def test_prox_is_the_function(backend):
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    start = copy.deepcopy(model)
    regs = L2SP(model, 0.3)
    move(model)
    move(twin)
    regs.prox_(0.1)
    l2sp_prox_(twin, start, 0.3, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("way", ["after unscale_", "grad_scale number", "grad_scale tensor"])
def test_grad_scaler(backend, way):
    """Steps under a loss scale of 2^10, which is exact, are the steps without it."""
    plain, scaled = Net(), Net()
    scaled.load_state_dict(plain.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 4)
    steps = [(m, L2SP(m, 0.3), torch.optim.SGD(m.parameters(), lr=0.1)) for m in (plain, scaled)]
    for _ in range(3):
        for model, reg, optimizer in steps:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if model is plain:
                loss.backward()
                expected = reg.add_grad_()
                optimizer.step()
                continue
            scaler.scale(loss).backward()
            if way == "after unscale_":
                scaler.unscale_(optimizer)
                value = reg.add_grad_()
            elif way == "grad_scale number":
                value = reg.add_grad_(grad_scale=scaler.get_scale())
            else:
                value = reg.add_grad_(grad_scale=scaler._scale)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-12)
            scaler.step(optimizer)
            scaler.update()
    assert expected.item() > 0
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_order_of_a_step_is_documented():
    text = inspect.getdoc(l2sp_add_grad_)
    assert text.index("unscale_") < text.index("before gradient clipping")
    assert "after" in inspect.getdoc(l2sp_prox_)


def test_distance(backend):
    model = Net()
    reg = L2SP(model, 0.3)
    move(model, 2.0)
    distance = reg.distance()
    assert list(distance) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        torch.testing.assert_close(distance[name].item(), 2 * p.numel() ** 0.5, rtol=1e-6, atol=0)
        assert not distance[name].requires_grad


# -------------------------------------------------------------------------------------------- life as a module


def test_model_is_no_submodule():
    model = Net()
    reg = L2SP(model, 0.3)
    assert list(reg.parameters()) == []
    assert all("head" not in name or name.startswith("start") for name, _ in reg.named_modules())
    parent = nn.Module()
    parent.model, parent.reg = model, reg
    assert len(list(parent.parameters())) == len(list(model.parameters()))
    assert not any(t.requires_grad for t in reg.buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_moves_the_start(backend, dtype):
    model = Net()
    reg = L2SP(model, 0.25)
    model.to(dtype)
    reg.to(dtype)
    assert {t.dtype for t in reg.state_dict().values()} == {dtype}
    assert reg().item() == 0
    with torch.no_grad():
        model.head.bias.copy_(reg.start.tensors()["head.bias"] + 1)
    assert reg().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert reg().item() == pytest.approx(0.25 * 3, rel=0.05)


def test_a_start_that_was_left_on_another_device():
    model = Net()
    reg = L2SP(model, 0.3)
    reg.to("meta")
    with pytest.raises(ValueError, match=r"backbone\.0\.weight.*meta.*cpu"):
        reg()


def test_start_in_another_precision(backend):
    model = Net().bfloat16()
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    reg = L2SP(model, 1.0, start=start)
    assert {t.dtype for t in reg.state_dict().values()} == {torch.float64}
    assert reg().item() == 0


def test_repr():
    text = repr(L2SP(Net(classes=7), 0.3, start=Net(classes=3), new_strength=0.2))
    for part in ("L2SP", "strength=0.3", "new_strength=0.2", "with_start=6", "new=2"):
        assert part in text


def test_deepcopy_and_pickle_together_with_the_model(backend):
    """As a trainer's checkpoint or copy does: the copy penalises the copied model, not the old one."""
    parent = nn.ModuleDict({"model": Net()})
    parent["reg"] = L2SP(parent["model"], 0.5)
    buffer = io.BytesIO()
    torch.save(parent, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(parent),
        pickle.loads(pickle.dumps(parent)),
        torch.load(buffer, weights_only=False),
    ):
        move(twin["model"], 1.0)
        torch.testing.assert_close(twin["reg"](), torch.tensor(0.5 * count(parent["model"])))
        assert parent["reg"]().item() == 0
        twin["reg"].add_grad_()
        assert all(p.grad is not None for p in twin["model"].parameters())


def test_strength_may_change_between_calls(backend):
    model = Net()
    reg = L2SP(model, 0.5)
    move(model, 1.0)
    before = reg()
    reg.strength = 1.0
    assert torch.equal(reg(), 2 * before)


@pytest.mark.parametrize("how", ["assign=True", "replaced layer"])
def test_parameters_that_were_replaced(backend, how):
    """The model's parameters of the moment count: to hold on to the old ones would be a penalty of 0 for ever."""
    model = Net()
    reg = L2SP(model, 0.5)
    if how == "assign=True":
        model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(reg(), torch.tensor(0.5 * count(model)))
    else:
        model.head = nn.Linear(5, 3)
        assert reg().item() > 0
    reg.add_grad_()
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_that_are_gone_or_have_another_shape():
    model = Net()
    reg = L2SP(model, 0.5)
    model.head = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=r"head\.weight.*\[3, 5\].*\[7, 5\]"):
        reg()
    model.head = None
    with pytest.raises(ValueError, match="head"):
        reg.add_grad_()
    assert all(p.grad is None for p in model.parameters())
