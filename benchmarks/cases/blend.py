"""The cases of blending in place: an average of two, an EMA, several sources, a bf16 model into an fp32 average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import naive, oracle, peers, shapes
from benchmarks.cases import problem
from benchmarks.cases.common import DTYPES, Spec, like_parameters
from benchmarks.cases.common import make as spec_of
from benchmarks.timing import Provider
from fasttransfer import blend_, blend_many_

LERP, LERPS, MUL_ADD = "_foreach_lerp_", "_foreach_lerp_ per source", "_foreach_mul_, _foreach_add_"
SWA = "swa_utils.AveragedModel"
Call = Callable[[list[Tensor]], Any]


class Problem(problem.Problem):
    """A target and its sources."""

    def __init__(
        self,
        of: Sequence[tuple[int, ...]],
        alpha: float,
        sources: int,
        source_dtype: str,
        function: Callable[..., Any],
    ) -> None:
        self.alpha, self.naive, self.mixed = alpha, function, source_dtype != "fp32"
        self.original, self.target = like_parameters(of, 0), like_parameters(of, 0)
        self.sources = [like_parameters(of, 1 + i, DTYPES[source_dtype]) for i in range(sources)]
        self.numbers = sum(t.numel() for t in self.target)
        self.floor_bytes = 2 * 4 * self.numbers  # read and write the target, read the sources
        self.floor_bytes += sum(s.numel() * s.element_size() for source in self.sources for s in source)

    def prepare(self) -> list[Tensor]:
        """The target as it was: the last call has overwritten it."""
        torch._foreach_copy_(self.target, self.original)
        return self.target

    def provider(self, name: str, call: Call, **more: Any) -> Provider:
        """Judged by the whole target."""
        return Provider(name, call, self.prepare, lambda target, _: target, **more)

    def ours(self) -> Call:
        """In one pass."""
        if len(self.sources) == 1:
            return lambda target: blend_(target, self.sources[0], self.alpha)
        return lambda target: blend_many_(target, self.sources, self.alpha)

    def by_hand(self, function: Callable[..., Any]) -> Call:
        """The naive code: a single source is given as a list of tensors, several as a list of such lists."""
        given: Any = self.sources if len(self.sources) > 1 else self.sources[0]
        return lambda target: function(target, given, self.alpha)

    def others(self, kinds: frozenset[str]) -> list[Provider]:
        """torch's own list calls and its EMA class; other libraries."""
        found = []
        if "torch" in kinds:
            several = len(self.sources) > 1
            if self.mixed or several:
                found.append(self.provider(MUL_ADD, self.mul_add))
            if not self.mixed:  # lerp takes one dtype only
                found.append(self.provider(LERPS if several else LERP, self.lerps))
            if self.naive is naive.ema and not self.mixed:
                found.append(self.provider(SWA, self.averaged_model()))
        return found + (self.peers() if "peers" in kinds else [])

    def peers(self) -> list[Provider]:
        """timm where an EMA is asked for, mergekit otherwise; nothing where they are not installed."""
        if self.naive is naive.ema:
            update = peers.timm_ema(self.target, self.alpha)
            return [] if update is None else [self.provider(peers.TIMM, lambda _: update(self.sources[0]))]
        merge = peers.mergekit_merge(self.target, self.sources, self.alpha)
        return [] if merge is None else [self.provider(peers.MERGEKIT, lambda _: merge())]

    def lerps(self, target: list[Tensor]) -> None:
        """One `_foreach_lerp_` per source: the cheapest chain of list calls, 12 bytes per number and source.

        The weights are such that the whole is `alpha * target + (1 - alpha) * mean(sources)`.
        """
        share, left = (1.0 - self.alpha) / len(self.sources), 1.0
        weights = []
        for _ in self.sources:  # from the last source to the first: each takes its share of what is left
            weights.append(share / left)
            left -= share
        for source, weight in zip(self.sources, reversed(weights), strict=True):
            torch._foreach_lerp_(target, source, weight)

    def mul_add(self, target: list[Tensor]) -> None:
        """The chain that also takes a source of another dtype."""
        torch._foreach_mul_(target, self.alpha)
        share = (1.0 - self.alpha) / len(self.sources)
        for source in self.sources:
            torch._foreach_add_(target, source, alpha=share)

    def averaged_model(self) -> Call:
        """torch's own EMA class with its own list function, its average on the memory of the target."""
        average = AveragedModel(peers.Parameters(self.target), multi_avg_fn=get_ema_multi_avg_fn(self.alpha))
        for held, given in zip(average.module.parameters(), self.target, strict=True):
            held.data = given
        average.n_averaged.fill_(1)  # the first update only copies
        model = peers.Parameters(self.sources[0])
        return lambda _: average.update_parameters(model)

    def error(self, outputs: Sequence[Tensor]) -> float:
        """Of the whole target."""
        return oracle.relative_error(outputs, oracle.blend(self.original, self.sources, self.alpha))


MODELS: dict[str, Callable[[], shapes.Shapes]] = {
    "ResNet-18": shapes.resnet18,
    "ViT-B/16": shapes.vit_b16,
    "GPT-2": shapes.gpt2,
    "600 small": shapes.small_tensors,
    "8x10": lambda: [(8, 10)],
}


def make(title: str, model: str, tags: str, alpha: float, sources: int = 1, function: Callable[..., Any] = naive.ema,
         source_dtype: str = "fp32", group: str = "one") -> Spec:  # fmt: skip
    """One kind of blend over one model; of the group `threads`, with one thread and two."""
    of, by_threads = MODELS[model](), group == "threads"
    title = f"{title} {model}" + ", threads" * by_threads
    return spec_of(
        "blend", title, partial(Problem, of, alpha, sources, source_dtype, function),
        Problem.by_threads if by_threads else Problem.everybody, tags, group=group, sources=sources,
        dtype="mixed" if source_dtype != "fp32" else "fp32", numbers=shapes.numbers(of), tensors=len(of),
    )  # fmt: skip


def specs() -> list[Spec]:
    """All cases of blend."""
    many = {"alpha": 0.4, "sources": 4, "function": naive.blend_many, "group": "many"}
    mixed = {"alpha": 0.999, "source_dtype": "bf16", "group": "mixed"}
    return [
        make("blend_", "ResNet-18", "compile demo quick", 0.5, function=naive.blend),
        make("blend_ EMA", "ResNet-18", "compile demo quick smoke", 0.999),
        make("blend_ EMA", "ViT-B/16", "compile", 0.999),
        make("blend_ EMA", "GPT-2", "", 0.999),
        make("blend_ EMA", "600 small", "quick", 0.999),
        make("blend_ EMA", "8x10", "demo quick", 0.999),
        make("blend_many_ x4", "ResNet-18", "compile demo quick smoke", **many),
        make("blend_many_ x4", "ViT-B/16", "compile", **many),
        make("blend_many_ x4", "GPT-2", "", **many),
        make("blend_many_ x4", "600 small", "quick", **many),
        make("blend_ bf16 into fp32", "ResNet-18", "compile demo quick smoke", **mixed),
        make("blend_ bf16 into fp32", "ViT-B/16", "compile", **mixed),
        make("blend_ bf16 into fp32", "GPT-2", "", **mixed),
        make("blend_ bf16 into fp32", "600 small", "quick", **mixed),
        make("blend_ EMA", "ResNet-18", "", 0.999, group="threads"),
        make("blend_many_ x4", "ResNet-18", "", **(many | {"group": "threads"})),
    ]
