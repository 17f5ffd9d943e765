"""Importance, strengths by name, and the optimizer hook of L2-SP."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fasttransfer import L2SP, l2sp_add_grad_, l2sp_penalty, l2sp_prox_
from tests import oracle

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((3,), (5, 7), (1,), (40, 41), (0,))


def problem(dtype, start_dtype=None, importance_dtype=F32):
    params = [torch.randn(s).to(dtype).requires_grad_() for s in SHAPES]
    start = [torch.randn(s).to(start_dtype or dtype) for s in SHAPES]
    return params, start, [torch.rand(s).to(importance_dtype) * 3 for s in SHAPES]


def exact_value(params, start, importance, strength):
    rows = zip(params, start, importance, strict=True)
    return strength * sum((f.double() * (p.detach().double() - p0.double()) ** 2).sum() for p, p0, f in rows)


@pytest.mark.parametrize("importance_dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_value_and_gradients(backend, dtype, importance_dtype):
    params, start, importance = problem(dtype, importance_dtype=importance_dtype)
    exact = exact_value(params, start, importance, 0.3)
    value = l2sp_penalty(params, start, 0.3, importance=importance)
    oracle.assert_norm_close(value, exact)
    grads = torch.autograd.grad(value, params)
    for accumulate in (False, True):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.ones_like(p) if accumulate else None
            assert g.dtype == p.dtype
        added = l2sp_add_grad_(params, start, 0.3, importance=importance, grad_scale=2.0)
        oracle.assert_norm_close(added, exact)
        for p, p0, f, g in zip(params, start, importance, grads, strict=True):
            step = 0.6 * f.double() * (p.detach().double() - p0.double())
            oracle.assert_norm_close(g, step)
            oracle.assert_norm_close(p.grad, 2 * step + accumulate)


@pytest.mark.parametrize("layout", ["strided", "misaligned", "channels_last"])
def test_layouts(backend, layout):
    def lay_out(t):
        if layout == "strided":
            return torch.stack([t, t], -1)[..., 0]
        if layout == "misaligned":
            return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        return t.to(memory_format=torch.channels_last)

    p, p0, f = (torch.randn(2, 3, 4, 5) for _ in range(3))
    f = f.abs()
    leaf = lay_out(p).detach().requires_grad_()
    value = l2sp_add_grad_([leaf], [lay_out(p0)], 0.5, importance=[f])
    oracle.assert_norm_close(value, exact_value([p], [p0], [f], 0.5))
    oracle.assert_norm_close(leaf.grad, f.double() * (p.double() - p0.double()))


def test_proximal_step(backend):
    params, start, importance = problem(F32)
    model = nn.ParameterList(params)
    names = [name for name, _ in model.named_parameters()]
    reg = L2SP(
        model,
        0.5,
        start=dict(zip(names, start, strict=True)),
        importance={"1": importance[1], "3": importance[3]},
    )
    before = [p.detach().double() for p in params]
    reg.prox_(2.0)
    for i, (p, p0) in enumerate(zip(params, start, strict=True)):
        h = 2.0 * (importance[i].double() if i in (1, 3) else 1)
        oracle.assert_norm_close(p, (before[i] + h * p0.double()) / (1 + h))
    for h in (1e-6, 1e6, 1e39):  # as exact near the start point as near the parameter; 0 weighs nothing
        far, f = torch.randn(100) * 1e4, torch.rand(100)
        f[:9] = 0
        for p, p0 in ((far, torch.randn(100)), (torch.randn(100) * 1e-3, far)):
            model = nn.ParameterList([p.clone()])
            L2SP(model, h / 2, start={"0": p0}, importance={"0": f}).prox_(1.0)
            weight = h * f.double()
            exact = (p.double() + weight * p0.double()) / (1 + weight)
            terms = (p.double().abs() + weight * p0.double().abs()) / (1 + weight)
            assert ((model[0].detach().double() - exact).abs() <= 4e-7 * terms).all()
    huge = nn.Linear(2, 2, bias=False)
    reg = L2SP(
        huge,
        1e30,
        start={"weight": torch.ones(2, 2)},
        importance={"weight": torch.tensor([[1e30, 0], [1, 1]])},
    )
    kept = huge.weight[0, 1].item()
    reg.prox_(1.0)
    assert huge.weight[0, 0] == 1
    assert huge.weight[0, 1] == kept


def test_module_with_importance_and_strengths_by_name(backend):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    start = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    importance = {"0.weight": torch.rand(4, 3), "1.bias": torch.rand(2)}
    reg = L2SP(model, {"0.*": 0.5, "*.bias": 0.1, "*": 0.0}, start=start, importance=importance)
    strengths = {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 0.0, "1.bias": 0.1}
    exact = sum(
        exact_value([p], [start[name]], [importance.get(name, torch.ones_like(p))], strengths[name])
        for name, p in model.named_parameters()
    )
    oracle.assert_norm_close(reg(), exact)
    oracle.assert_norm_close(reg.add_grad_(), exact)
    assert "importance.0.weight" in reg.state_dict()
    again = L2SP(model, 1.0, importance={name: torch.zeros_like(f) for name, f in importance.items()})
    again.load_state_dict(reg.state_dict())
    assert torch.equal(again.importance.tensors()["1.bias"], importance["1.bias"])
    assert "by name" in repr(reg)


def by_hand(model, kind, by, strength, steps=3):
    """What the hook must amount to."""
    optimizer = kind(model.parameters(), lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        if by == "grad":
            l2sp_add_grad_(list(model.parameters()), start, strength)
        optimizer.step()
        if by == "prox":
            l2sp_prox_(list(model.parameters()), start, strength, 0.1)
    return model


@pytest.mark.parametrize(
    "kind, by, does",
    [
        (torch.optim.SGD, "auto", "grad"),
        (torch.optim.AdamW, "auto", "prox"),
        (torch.optim.SGD, "prox", "prox"),
        (torch.optim.AdamW, "grad", "grad"),
    ],
)
def test_optimizer_hook(one_backend, kind, by, does):
    model = nn.Linear(3, 2)
    expected = by_hand(copy.deepcopy(model), kind, does, 0.3)
    optimizer = kind(model.parameters(), lr=0.1)
    handle = L2SP(model, 0.3).attach(optimizer, by=by)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    handle.remove()
    kept = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))


def test_hook_of_an_optimizer_that_maximizes(one_backend):
    """The penalty's gradient would be climbed too."""
    model = nn.Linear(3, 2)
    reg = L2SP(model, 0.3, start={name: torch.zeros_like(p) for name, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    with pytest.raises(ValueError, match="by='grad' is for optimizers that minimize"):
        reg.attach(optimizer, by="grad")
    reg.attach(optimizer)
    expected = model.weight.detach() / (1 + 2 * 0.1 * 0.3)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), expected)


def test_hook_takes_the_step_size_of_each_group(one_backend):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters(), "lr": 0.25}]
    optimizer = torch.optim.Adam(groups)
    reg = L2SP(model, 1.0)
    reg.attach(optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    optimizer.step()  # without gradients Adam does nothing, the hook does
    for layer, h in ((model[0], 1.0), (model[1], 0.5), (model[2], 0.0)):
        moved = layer.weight.detach() - reg.start.tensors()[f"{list(model).index(layer)}.weight"]
        torch.testing.assert_close(moved, torch.full_like(moved, 1 / (1 + h)))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_hook_of_a_fused_optimizer_under_a_scaler(one_backend, kind):
    """It unscales gradients and skips a step by itself, inside of ``step()``."""
    results = []
    for fused in (False, True):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.arange(1.0, p.numel() + 1).view_as(p))
        reg = L2SP(model, 0.3)
        with torch.no_grad():
            model.weight += 0.5
        optimizer = kind(model.parameters(), lr=0.1, fused=fused)
        reg.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale(factor * model(torch.ones(2, 3)).sum()).backward()
            before = model.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(model.weight, before) == (factor == float("inf"))
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results)


def test_opcheck_and_gradcheck(one_backend):
    p, p0, f = (torch.randn(4, dtype=F64) for _ in range(3))
    f = f.abs()
    leaf = p.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: l2sp_penalty([x], [p0], 0.3, importance=[f]), (leaf,))
    compiled = torch.compile(lambda x: l2sp_penalty([x], [p0], 0.3, importance=[f]), fullgraph=True)
    torch.testing.assert_close(compiled(leaf), l2sp_penalty([leaf], [p0], 0.3, importance=[f]))


def test_errors():
    p, p0 = [torch.randn(3, requires_grad=True)], [torch.randn(3)]
    model = nn.Linear(3, 2)
    for importance, error, words in (
        ([torch.ones(2)], ValueError, r"importance\[0\] has shape \[2\]"),
        ([torch.tensor([1.0, -1.0, 0.0])], ValueError, r"importance\[0\] must be at least 0, got -1"),
        ([torch.ones(3).long()], TypeError, r"importance\[0\] must be float32"),
        ([torch.ones(3), torch.ones(3)], ValueError, "importance must have as many tensors"),
        ([torch.ones(3, requires_grad=True)], ValueError, "importance.*constant"),
    ):
        with pytest.raises(error, match=words):
            l2sp_penalty(p, p0, 1.0, importance=importance)
        with pytest.raises(error, match=words), torch.enable_grad():
            l2sp_add_grad_(p, p0, 1.0, importance=importance)
        assert p[0].grad is None
    for options, error, words in (
        ({"importance": {"wieght": torch.ones(2, 3)}}, ValueError, "importance: 'wieght' matches none"),
        ({"importance": {"weight": torch.ones(3, 2)}}, ValueError, r"importance\['weight'\] has shape"),
        ({"importance": [torch.ones(2, 3)]}, TypeError, "importance must be a dict"),
        ({"strength": {"weight": 0.1}}, ValueError, "strength has no pattern for 'bias'"),
        ({"strength": {"*": -0.1}}, ValueError, "strength of 'weight' must be at least 0"),
    ):
        with pytest.raises(error, match=words):
            L2SP(model, **{"strength": 1.0, **options})
    reg = L2SP(model, 1.0)
    with pytest.raises(TypeError, match="optimizer must be"):
        reg.attach(model)
    with pytest.raises(ValueError, match="by must be one of"):
        reg.attach(torch.optim.SGD(model.parameters()), by="step")
    with pytest.raises(ValueError, match="none of the parameters"):
        reg.attach(torch.optim.SGD(nn.Linear(1, 1).parameters()))
