"""The cases of distillation from hidden states and heads: the logits of all rows in memory, or of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import naive, oracle
from benchmarks.cases import problem
from benchmarks.cases.common import Spec, make
from benchmarks.cases.kd_problem import TEMPERATURE, leaf_of
from benchmarks.timing import Provider, Roofline
from fasttransfer import kd_loss, linear_kd_loss

WHOLE, PRODUCTS = "kd_loss, whole logits", "four matrix products"
Leaves = tuple[Tensor, Tensor]
Loss = Callable[[Leaves], Tensor]


class Problem(problem.Problem):
    """Hidden states and heads of both sides; logits of scale about 3."""

    naive = staticmethod(naive.linear_kd)

    def __init__(self, rows: int, width: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(size, width, generator=generator) for size in (rows, vocab) * 2]
        for head in made[1::2]:
            head.mul_(3 * width**-0.5)
        self.hidden, self.head, self.teacher_hidden, self.teacher_head = made
        self.numbers = rows * vocab
        self.floor_bytes = 4 * 2 * rows * width * vocab  # operations of the four products
        self.answer: list[Tensor] | None = None

    def by_hand(self, function: Callable[..., Any]) -> Loss:
        """A loss with the arguments of the naive code."""
        return lambda leaves: function(*leaves, self.teacher_hidden, self.teacher_head, TEMPERATURE)

    def ours(self) -> Loss:
        """linear_kd_loss."""
        return lambda leaves: linear_kd_loss(
            *leaves, self.teacher_hidden, self.teacher_head, temperature=TEMPERATURE
        )

    def others(self, kinds: frozenset[str]) -> list[Provider]:
        """Ours of whole logits."""

        def whole(leaves: Leaves) -> Tensor:
            with torch.no_grad():
                teacher = F.linear(self.teacher_hidden, self.teacher_head)
            return kd_loss(F.linear(*leaves), teacher, temperature=TEMPERATURE)

        return [self.provider(WHOLE, whole, ours=True)]

    def provider(self, name: str, call: Loss, **more: Any) -> Provider:
        """Forward and backward, judged by the loss and both gradients."""

        def forward_backward(leaves: Leaves) -> Tensor:
            loss = call(leaves)
            loss.backward()
            return loss

        def outputs(leaves: Leaves, loss: Tensor) -> list[Tensor]:
            return [loss.detach(), *(x.grad for x in leaves)]  # type: ignore[list-item]

        return Provider(
            name, forward_backward, lambda: (leaf_of(self.hidden), leaf_of(self.head)), outputs, **more
        )

    def error(self, outputs: Sequence[Tensor]) -> float:
        """Of the loss and both gradients."""
        if self.answer is None:
            self.answer = oracle.linear_kd(
                self.hidden, self.head, self.teacher_hidden, self.teacher_head, TEMPERATURE
            )
        return oracle.relative_error(outputs, self.answer)

    def roofline(self, suffix: str = "", **more: Any) -> Roofline:
        """Both sides' logits and both gradients, without a loss between them."""
        logits = torch.empty(len(self.hidden), len(self.head))
        gradients = torch.empty_like(self.hidden), torch.empty_like(self.head)

        def products(_: None) -> Tensor:
            torch.mm(self.teacher_hidden, self.teacher_head.T, out=logits)
            torch.mm(self.hidden, self.head.T, out=logits)
            torch.mm(logits, self.head, out=gradients[0])
            return torch.mm(logits.T, self.hidden, out=gradients[1])

        call = Provider(PRODUCTS + suffix, products, lambda: None, lambda _, out: [out], **more)
        return Roofline(call, self.floor_bytes)


def linear(rows: int, width: int, vocab: int, tags: str) -> Spec:
    """One size."""
    return make(
        "kd", f"kd linear {rows}x{width}x{vocab}", partial(Problem, rows, width, vocab), Problem.everybody, tags,
        group="linear", dtype="fp32", rows=rows, vocab=vocab,
    )  # fmt: skip


def linear_specs() -> list[Spec]:
    """All cases: seconds per call, half a second, milliseconds."""
    return [
        linear(2048, 512, 32000, ""),
        linear(512, 256, 16000, "compile quick"),
        linear(256, 64, 4000, "smoke"),
    ]
