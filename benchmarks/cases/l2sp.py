"""The cases of L2-SP: value and gradient of the penalty, added to gradients that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, oracle, shapes
from benchmarks.cases import problem
from benchmarks.cases.common import Spec, like_parameters
from benchmarks.cases.common import make as spec_of
from benchmarks.timing import Case, Provider
from fasttransfer import l2sp_add_grad_, simd_levels

STRENGTH = 0.01
HAD = 0.003  # every gradient before the call: what backward of a data loss left there
FOREACH = "_foreach calls"
Call = Callable[[list[Tensor]], Tensor]


class Problem(problem.Problem):
    """Parameters with gradients, and their start."""

    naive = staticmethod(naive.l2sp)

    def __init__(self, of: Sequence[tuple[int, ...]]) -> None:
        self.params = [p.requires_grad_(True) for p in like_parameters(of, 0)]
        self.start = like_parameters(of, 1)
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.numbers = sum(p.numel() for p in self.params)
        self.floor_bytes = 4 * 4 * self.numbers  # read p, p0 and the gradient, write the gradient

    def prepare(self) -> list[Tensor]:
        """The gradients of a data loss, as its backward has just written them: the same for everybody."""
        for p in self.params:
            p.grad.fill_(HAD)  # type: ignore[union-attr]
        return self.params

    def provider(self, name: str, call: Call, **more: Any) -> Provider:
        """Judged by the value and by all gradients."""

        def outputs(params: list[Tensor], value: Tensor) -> list[Tensor]:
            return [value.detach(), *(p.grad for p in params)]  # type: ignore[list-item]

        return Provider(name, call, self.prepare, outputs, **more)

    def ours(self) -> Call:
        """In one pass, without a graph."""
        return lambda params: l2sp_add_grad_(params, self.start, STRENGTH)

    def by_hand(self, function: Callable[..., Any]) -> Call:
        """A penalty as a loss term: its backward adds to the gradients."""

        def value_and_grad(params: list[Tensor]) -> Tensor:
            loss = function(params, self.start, STRENGTH)
            loss.backward()
            return loss

        return value_and_grad

    def others(self, kinds: frozenset[str]) -> list[Provider]:
        """torch's own list calls."""
        return [self.provider(FOREACH, self.foreach)] if "torch" in kinds else []

    @torch.no_grad()
    def foreach(self, params: list[Tensor]) -> Tensor:
        """What torch's own list operations make of it, without a graph: the most a careful user writes."""
        distance = torch._foreach_sub(params, self.start)
        torch._foreach_add_([p.grad for p in params], distance, alpha=2.0 * STRENGTH)
        return STRENGTH * torch.stack(torch._foreach_powsum(distance, 2)).sum()

    def error(self, outputs: Sequence[Tensor]) -> float:
        """Of the value and of all gradients."""
        params = [p.detach() for p in self.params]
        return oracle.relative_error(outputs, oracle.l2sp(params, self.start, HAD, STRENGTH))


def make(
    model: str,
    of: shapes.Shapes,
    tags: str,
    group: str = "l2sp",
    builder: Callable[[Problem, Spec, frozenset[str]], Case] = Problem.everybody,
) -> Spec:
    """The parameters of one model."""
    about = {"dtype": "fp32", "numbers": shapes.numbers(of), "tensors": len(of), "group": group}
    return spec_of("l2sp", f"l2sp_add_grad_ {model}", partial(Problem, of), builder, tags, **about)


def specs() -> list[Spec]:
    """All cases of l2sp."""
    resnet18 = shapes.resnet18()
    # No torch.compile over 600 tensors: one compilation takes minutes.
    listed = [
        make("ResNet-18", resnet18, "compile demo quick smoke"),
        make("ViT-B/16", shapes.vit_b16(), "compile"),
        make("GPT-2", shapes.gpt2(), ""),
        make("600 small", shapes.small_tensors(), "quick"),
        make("8x10", [(8, 10)], "demo quick"),
        make("ResNet-18, threads", resnet18, "quick", "threads", Problem.by_threads),
    ]
    if simd_levels():
        listed.append(make("ResNet-18, SIMD levels", resnet18, "quick", "simd", Problem.by_level))
    return listed
