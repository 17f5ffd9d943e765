"""The problem of distillation: logits of one size, the exact answer, and how a loss becomes a provider.

All logits are random and independent of each other: nothing is one-hot, masked or equal, so nothing can be skipped.
The teacher has no gradient; the student is a fresh leaf for every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, peers
from benchmarks.cases import problem
from benchmarks.cases.common import DTYPES
from benchmarks.oracle import Distillation
from benchmarks.timing import Provider, Roofline
from fasttransfer import kd_loss

TEMPERATURE, LABEL_WEIGHT = 2.0, 0.3
ADD, ADD_OUT = "torch.add(a, b)", "torch.add(a, b, out=o)"
Loss = Callable[[Tensor], Tensor]


class Problem(problem.Problem):
    """Student, teacher and labels of one size."""

    def __init__(
        self, rows: int, vocab: int, dtype: str = "fp32", labelled: bool = False, backward: bool = True
    ) -> None:
        self.rows, self.vocab, self.dtype, self.backward = rows, vocab, dtype, backward
        self.student, self.teacher = (self._logits(seed) for seed in (0, 1))
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.randint(vocab, (rows,), generator=generator) if labelled else None
        self.naive = naive.kd_with_labels if labelled else naive.kd
        self.exact = Distillation(self.student, self.teacher, self.labels, TEMPERATURE, LABEL_WEIGHT)
        self.numbers = self.student.numel()  # logits on one side
        # Read both sides; with backward, write the gradient.
        self.floor_bytes = (3 if backward else 2) * self.numbers * self.student.element_size()

    def _logits(self, seed: int) -> Tensor:
        """Random logits [rows, vocab] of scale 3."""
        made = torch.randn(self.rows, self.vocab, generator=torch.Generator().manual_seed(seed))
        return made.mul_(3.0).to(DTYPES[self.dtype])

    def by_hand(self, function: Callable[..., Any]) -> Loss:
        """A loss with the arguments of the naive code."""
        arguments: tuple[Any, ...] = (TEMPERATURE,)
        if self.labels is not None:
            arguments = (self.labels, TEMPERATURE, LABEL_WEIGHT)
        return lambda leaf: function(leaf, self.teacher, *arguments)

    def ours(self, **options: Any) -> Loss:
        """kd_loss."""
        if self.labels is not None:
            options["label_weight"] = LABEL_WEIGHT
        return lambda leaf: kd_loss(leaf, self.teacher, self.labels, temperature=TEMPERATURE, **options)

    def others(self, kinds: frozenset[str]) -> list[Provider]:
        """Other libraries; none of them takes labels in the same call."""
        if "peers" not in kinds or self.labels is not None:
            return []
        losses = peers.kd_losses(self.teacher, TEMPERATURE)
        return [self.provider(name, loss) for name, loss in losses.items()]

    def provider(self, name: str, call: Loss, **more: Any) -> Provider:
        """Forward and backward, or forward only, of a loss of the student."""
        if not self.backward:
            return Provider(name, torch.no_grad()(call), lambda: self.student, lambda _, out: [out], **more)
        return Provider(name, and_backward(call), lambda: leaf_of(self.student), loss_and_grad, **more)

    def error(self, outputs: Sequence[Tensor]) -> float:
        """Of the loss and, with backward, of the gradient."""
        return self.exact.error(outputs)

    def roofline(self, suffix: str = "", given: bool = False, **more: Any) -> Roofline:
        """`torch.add(a, b)`: two reads and a write per element, as in kd, into new memory or into `given`.

        Forward only allocates nothing: the call that writes into given memory is the one like it, and the faster one.
        """
        a, b = self.student, self.teacher
        call = Provider(ADD + suffix, lambda _: torch.add(a, b), lambda: None, lambda _, out: [out], **more)
        if given or not self.backward:
            into = torch.empty_like(a)
            call = replace(call, name=ADD_OUT + suffix, call=lambda _: torch.add(a, b, out=into))
        return Roofline(call, 3 * self.numbers * a.element_size())


def leaf_of(tensor: Tensor) -> Tensor:
    """A fresh leaf on the same memory: no gradient yet, and nothing copied that would warm the caches."""
    return tensor.detach().requires_grad_(True)


def loss_and_grad(leaf: Tensor, loss: Tensor) -> list[Tensor]:
    """What a provider of a loss is judged by: its value and the gradient it left in its leaf."""
    return [loss.detach(), leaf.grad]  # type: ignore[list-item]


def and_backward(loss_function: Loss) -> Loss:
    """Forward and backward of a loss of one leaf, as one timed call."""

    def forward_backward(leaf: Tensor) -> Tensor:
        loss = loss_function(leaf)
        loss.backward()
        return loss

    return forward_backward
