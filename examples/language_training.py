"""Training a language model: batches, AdamW with a schedule, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, RATE, WARM_UP = 16, 2e-3, 30


def next_token(sequences: Tensor) -> Tensor:
    """The labels beside whole logits: shifted, the last position without one."""
    return F.pad(sequences[:, 1:], (0, 1), value=-100)


def batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Row numbers [BATCH] of sequences, epoch after epoch."""
    random = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(left) < BATCH:
            left = torch.randperm(count, generator=random)
        yield left[:BATCH]
        left = left[BATCH:]


def optimized(model: nn.Module, steps: int) -> Callable[[Tensor], None]:
    """A step of AdamW on a loss: warm-up, then a cosine to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    warm_up = min(WARM_UP, steps // 2)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    return step


def train(
    model: nn.Module, sequences: Tensor, steps: int, seed: int, loss_of: Callable[[Tensor, Tensor], Tensor],
    watch: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """`loss_of(sequences [BATCH, CONTEXT], their row numbers)` per step."""
    model.train()
    step = optimized(model, steps)
    for i, rows in enumerate(batches(len(sequences), steps, seed)):
        step(loss_of(sequences[rows], rows))
        watch(i + 1)


@torch.no_grad()
def bits_per_byte(model: nn.Module, sequences: Tensor) -> float:
    """Of the bytes that have one before them in their sequence."""
    was = model.training
    model.eval()
    total = 0.0
    for part in sequences.split(32):
        logits = model(part).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    model.train(was)
    return total / math.log(2) / sequences[:, 1:].numel()
