"""fisher_importance against a loop over samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasttransfer import fisher_importance


def net(dtype=torch.float64):
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(dtype)


def by_a_loop(model, x, y):
    model.eval()
    names, params = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in params]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        total = [a + g.square() for a, g in zip(total, grads, strict=True)]
    return {name: a / len(x) for name, a in zip(names, total, strict=True)}


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_labels_of_the_data(chunk):
    model, x, y = net(), torch.randn(10, 6, dtype=torch.float64), torch.randint(3, (10,))
    model[1].eval()
    modes = [m.training for m in model.modules()]
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = fisher_importance(model, batches, labels="data", chunk=chunk)
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    for name, exact in by_a_loop(model, x, y).items():
        torch.testing.assert_close(found[name], exact)
    part = fisher_importance(model, batches, labels="data", samples=5, include="0.*")
    assert list(part) == ["0.weight", "0.bias"]
    torch.testing.assert_close(part["0.weight"], by_a_loop(model, x[:5], y[:5])["0.weight"])


def test_labels_of_the_model():
    """In expectation over labels: sum_y p(y | x) (d log p(y | x))^2."""
    model, x = net().eval(), torch.randn(4, 6, dtype=torch.float64)
    p = torch.softmax(model(x), -1).detach()
    exact = torch.zeros_like(model[4].weight)
    for y in range(3):
        for i in range(4):
            (g,) = torch.autograd.grad(
                F.cross_entropy(model(x[i : i + 1]), torch.tensor([y])), model[4].weight
            )
            exact += p[i, y] * g.square() / 4
    found = fisher_importance(model, [x] * 800, chunk=4, include="4.weight", seed=1)["4.weight"]
    assert (found - exact).norm() < 0.05 * exact.norm()
    again = fisher_importance(model, [(x, None)] * 3, seed=1)
    for name, value in fisher_importance(model, [x] * 3, seed=1).items():
        assert torch.equal(value, again[name])


def test_tied_parameters_have_all_their_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(fisher_importance(model, [torch.randn(5, 4)], include="1.*")) == ["0.weight", "1.bias"]


def test_dtypes_and_frozen_parameters():
    model = net(torch.float32)
    model[0].weight.requires_grad_(False)
    found = fisher_importance(model, [torch.randn(5, 6)])
    assert "0.weight" not in found
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert all((v >= 0).all() for v in found.values())


def test_errors():
    model, x = net(torch.float32), torch.randn(2, 6)
    for arguments, options, error, words in (
        ((model, []), {}, ValueError, "no samples"),
        ((model, [x]), {"labels": "data"}, TypeError, r"\(inputs, labels\)"),
        ((model, [{"x": x}]), {}, TypeError, "a tensor of inputs, got dict"),
        ((model, [x]), {"labels": "true"}, ValueError, "labels must be one of"),
        ((model, [x]), {"chunk": 0}, ValueError, "chunk must be at least 1"),
        ((model, [x]), {"include": "9.*"}, ValueError, "matches none"),
        ((nn.Conv1d(6, 2, 1), [torch.randn(2, 6, 3)]), {}, ValueError, r"logits \[N, V\].*labels='data'"),
        ((nn.ReLU(), [x]), {}, ValueError, "no trained parameters"),
        ((3, [x]), {}, TypeError, r"model must be a torch\.nn\.Module"),
    ):
        with pytest.raises(error, match=words):
            fisher_importance(*arguments, **options)
