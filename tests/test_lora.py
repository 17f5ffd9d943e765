"""lora_penalty against the materialised product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttransfer import lora_penalty


def exact(triples, strength):
    return strength * sum(((c * b.double() @ a.double()) ** 2).sum() for a, b, c in triples)


def factors(dtype=torch.float32):
    return [
        (torch.randn(4, 30).to(dtype), torch.randn(20, 4).to(dtype), 2.0),
        (torch.randn(1, 7).to(dtype), torch.randn(9, 1).to(dtype), -0.5),
        (torch.randn(8, 5).to(dtype), torch.zeros(6, 8).to(dtype), 1.0),  # as an adapter begins
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_value(dtype):
    triples = factors(dtype)
    value = lora_penalty(triples, 0.3)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert abs(value.double() - exact(triples, 0.3)) <= (1e-12 if dtype == torch.float64 else 1e-5) * value
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_penalty(triples, 0.3), value)


def test_gradients():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    leaves = a.requires_grad_(), b.requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, y: lora_penalty([(x, y, 1.5)], 0.7), leaves)
    compiled = torch.compile(lambda x, y: lora_penalty([(x, y, 1.5)], 0.7), fullgraph=True)
    torch.testing.assert_close(compiled(a, b), lora_penalty([(a, b, 1.5)], 0.7))


class Layer(nn.Module):
    """What peft's layers hold, by the names of their attributes."""

    def __init__(self, kind, a, b, scaling, magnitude=False):
        super().__init__()
        self.scaling = {"default": scaling}
        if kind == "embedding":
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(a)})
            self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(b)})
        else:
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
            for factors, value in ((self.lora_A, a), (self.lora_B, b)):
                layer = nn.Module()
                layer.weight = nn.Parameter(value[..., None, None] if kind == "conv" else value)
                factors["default"] = layer
        self.lora_magnitude_vector = nn.ModuleDict({"default": nn.Identity()} if magnitude else {})


def test_layers_of_a_model():
    triples = factors()
    kinds = ("linear", "conv", "embedding")
    model = nn.Sequential(nn.Linear(2, 2), *(Layer(k, *t) for k, t in zip(kinds, triples, strict=True)))
    torch.testing.assert_close(lora_penalty(model, 0.3).double(), exact(triples, 0.3), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"no layer .* adapter 'other'"):
        lora_penalty(model, 0.3, adapter="other")
    with pytest.raises(ValueError, match="DoRA"):
        lora_penalty(nn.Sequential(Layer("linear", *triples[0], magnitude=True)), 0.3)


def test_errors():
    a, b, _ = factors()[0]
    for given, error, words in (
        ([], ValueError, "no triple"),
        ([(b, a, 1.0)], ValueError, r"A \[r, d_in\] and B \[d_out, r\]"),
        ([(a.long(), b, 1.0)], TypeError, "must be float32"),
        ([(a, b, "1")], TypeError, "must be a number"),
        ((a, b, 1.0), TypeError, r"adapters\[0\] must be a triple .* got Tensor"),
        ([(a, b)], TypeError, r"adapters\[0\] must be a triple"),
        ({"layer": (a, b, 1.0)}, TypeError, "adapters must be triples .* got dict"),
        (None, TypeError, "adapters must be triples .* got NoneType"),
    ):
        with pytest.raises(error, match=words):
            lora_penalty(given, 0.3)
    with pytest.raises(ValueError, match="strength must be at least 0"):
        lora_penalty([(a, b, 1.0)], -1)
