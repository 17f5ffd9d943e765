"""What the examples share beside the data: one CNN, the usual training on labels, and accuracy."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import CLASSES, Split

SOURCE_STEPS, SOURCE_BATCH, SOURCE_RATE = 200, 128, 3e-3

M = TypeVar("M", bound=nn.Module)


class CNN(nn.Module):
    """38,000 parameters: a trunk of two convolutions, a neck of 64 features, a head."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )  # fmt: skip
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 1, 8, 8]."""
        return self.head(self.neck(self.trunk(images)))


def new_cnn(seed: int, classes: int = CLASSES) -> CNN:
    """A CNN whose initial weights are drawn from `seed`."""
    torch.manual_seed(seed)
    return CNN(classes)


def pretrained_cnn(source: Split, seed: int) -> CNN:
    """The source model of a seed: a CNN trained on all the labels of the source task, in batches."""
    model = new_cnn(seed, classes=int(source.labels.max()) + 1)
    return train(model, source, steps=SOURCE_STEPS, rate=SOURCE_RATE, batch=SOURCE_BATCH)


def train(model: M, data: Split, *, steps: int, rate: float, batch: int | None = None) -> M:
    """Adam on the cross entropy of what is not frozen; without `batch`, each step sees all images. Returns `model`."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    for _ in range(steps):
        seen = data if batch is None else data[torch.randint(len(data.labels), (batch,))]
        optimizer.zero_grad()
        F.cross_entropy(model(seen.images), seen.labels).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """The share of images that are classified right."""
    return right(model(data.images), data.labels)


def right(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is that of the label."""
    return (logits.argmax(-1) == labels).double().mean().item()
