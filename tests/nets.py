"""The models of the tests of L2SP and of blending by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Nested names, buffers, a backbone and a head."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5)))
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).relu())


def tied() -> nn.Sequential:
    """A weight under two names, as the embedding and the head of a language model."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    return model


def move(model: nn.Module, by: float = 0.5) -> None:
    """Add to all parameters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
