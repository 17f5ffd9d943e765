"""torch.compile(fullgraph=True): a loss with kd_loss and L2SP in it, and a step of l2sp_add_grad_, update, blend_.

Once each with inductor, on the backend that users get; the variants stop before code generation (aot_eager), which
traces, functionalises and partitions the same graph.
"""

from __future__ import annotations

import pytest
import torch

from fasttransfer import L2SP, blend, blend_, blend_many_, kd_loss, l2sp_add_grad_, l2sp_penalty, l2sp_prox_
from tests.nets import Net, move, tied

pytestmark = pytest.mark.usefixtures("one_backend")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f, backend="inductor", **options):
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def assert_same(expected, actual):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ a loss, with backward outside


def make_loss(model, reg, teacher):
    def loss(x, y):
        with torch.no_grad():
            soft = teacher(x)
        return kd_loss(model(x), soft, y, label_weight=0.3, temperature=2.0) + reg()

    return loss


def loss_and_grads(loss, model, x, y):
    model.zero_grad()
    value = loss(x, y)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("backend, sizes", [("inductor", [16]), ("aot_eager", [16, 8, 5])])
def test_a_model_with_kd_loss_and_l2sp_in_its_loss(backend, sizes):
    model, teacher = Net(), Net().eval()
    reg = L2SP(model, 0.05)
    move(model, 0.1)
    loss = make_loss(model, reg, teacher)
    fast = compiled(loss, backend)
    for size in sizes:  # a new size recompiles with dynamic shapes
        x, y = torch.randn(size, 4), torch.randint(3, (size,))
        assert_same(loss_and_grads(loss, model, x, y), loss_and_grads(fast, model, x, y))


def test_new_parameters_frozen_ones_and_thawing():
    model, pretrained = Net(classes=3), Net(classes=7)
    reg = L2SP(model, 0.05, start=pretrained, new_strength=0.3)
    fast = compiled(reg, "aot_eager")
    for frozen in (True, False):
        model.backbone.requires_grad_(not frozen)
        results = []
        for f in (reg, fast):
            model.zero_grad()
            value = f()
            value.backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            assert len(grads) == (2 if frozen else 8)
            results.append([value.detach(), *grads])
        assert_same(*results)


def test_the_function_on_lists_and_dicts():
    model = Net()
    start = {name: p.detach() + 0.5 for name, p in model.named_parameters()}
    params = list(model.parameters())

    def of_dict():
        return l2sp_penalty(dict(model.named_parameters()), start, 0.3)

    def of_list():
        return l2sp_penalty(params, list(start.values()), 0.3)

    for f in (of_dict, of_list):
        grads = [torch.autograd.grad(g(), params) for g in (f, compiled(f, "aot_eager"))]
        assert_same(*grads)


# ----------------------------------------------------------------------- l2sp_add_grad_, an update, an average


def lists():
    torch.manual_seed(0)
    params = [torch.randn(shape, requires_grad=True) for shape in ((5, 4), (5,), (3, 5, 2))]
    start = [p.detach() + 0.1 * torch.randn_like(p) for p in params]
    average = [torch.randn_like(p).detach() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, start, average


def in_place_step(params, start, average):
    value = l2sp_add_grad_(params, start, 0.1)
    with torch.no_grad():
        for p in params:
            p.sub_(p.grad, alpha=0.1)
    blend_(average, params, 0.9)
    return value


def functional_step(params, start, average):
    value = l2sp_add_grad_(params, start, 0.1)
    blend_(average, [p.detach() - 0.1 * p.grad for p in params], 0.9)
    return value


def prox_step(params, start, average):
    with torch.no_grad():
        for p in params:
            p.sub_(p.grad, alpha=0.1)
    l2sp_prox_(params, start, 0.1, 0.1)
    blend_many_(average, [params, start], 0.9, weights=[0.75, 0.25])


def tensor_alpha_step(params, start, average):
    value = l2sp_add_grad_(params, start, 0.1, grad_scale=torch.tensor(2.0))
    blend_(average, params, torch.tensor(0.9))
    return value


@pytest.mark.parametrize(
    "step, backend, with_grads",
    [
        (functional_step, "inductor", True),
        (in_place_step, "inductor", True),
        (functional_step, "aot_eager", False),
        (in_place_step, "aot_eager", False),
        (prox_step, "aot_eager", True),
        (tensor_alpha_step, "aot_eager", True),
    ],
)
def test_a_step_on_lists(step, backend, with_grads):
    """Three times, so that gradients that were None are written once and then added to."""
    states = []
    for f in (step, compiled(step, backend)):
        params, start, average = lists()
        if not with_grads:
            for p in params:
                p.grad = None
        values = [f(params, start, average) for _ in range(3)]
        states.append([values, params, [p.grad for p in params], average])
    assert_same(*states)


def test_a_step_on_modules():
    states = []
    for wrap in (lambda f: f, compiled):
        torch.manual_seed(0)
        model, average, start = Net(), Net(), Net()
        reg = L2SP(model, 0.1, start=start)
        for p in model.parameters():
            p.grad = torch.randn_like(p)

        def step(model=model, average=average, reg=reg):
            value = reg.add_grad_()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.1)
            blend_(average, model, 0.9, buffers="copy")
            return value

        fast = wrap(step)
        values = [fast() for _ in range(2)]
        states.append(
            [values, model.state_dict(), average.state_dict(), [p.grad for p in model.parameters()]]
        )
    assert_same(*states)


def test_blend_is_differentiable_when_compiled():
    """In target, source and a learnable alpha per pattern; strides are the target's."""
    target, source = Net().backbone[0], Net().backbone[0]
    alpha = {"bias": torch.tensor(0.3, requires_grad=True), "*": 0.8}
    x = torch.randn(6, 4)

    def loss(x):
        return torch.func.functional_call(target, blend(target, source, alpha), (x,)).square().mean()

    leaves = [*target.parameters(), *source.parameters(), alpha["bias"]]
    results = []
    for f in (loss, compiled(loss, "aot_eager")):
        value = f(x)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert_same(*results)


def test_tied_models():
    model, average = tied(), tied()
    reg = L2SP(model, 0.1, start=tied())

    def step():
        value = reg.add_grad_()
        blend_(average, model, 0.9)
        return value

    expected = average[0].weight.detach() * 0.9 + model[0].weight.detach() * 0.1
    value = compiled(step, "aot_eager")()
    assert_same(expected, average[0].weight.detach())
    assert_same(reg().detach(), value)
