"""The cases of blending in place: an average of two, an EMA, several sources, a bf16 model into an fp32 average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import naive, oracle, peers, shapes
from benchmarks.cases.common import (
    COMPILED,
    DTYPES,
    NAIVE,
    OURS,
    REFERENCE,
    Spec,
    calls_for,
    compiled,
    is_memory_bound,
    key_of,
    lerp_roofline,
    like_parameters,
    threads,
)
from benchmarks.timing import Case, Provider
from fasttransfer import blend_, blend_many_, build_info, use_backend

LERP, LERPS, MUL_ADD = "_foreach_lerp_", "_foreach_lerp_ per source", "_foreach_mul_, _foreach_add_"
SWA = "swa_utils.AveragedModel"
Call = Callable[[list[Tensor]], Any]


class Problem:
    """A target, its sources, and how a call becomes a provider."""

    def __init__(self, of: Sequence[tuple[int, ...]], alpha: float, sources: int, source_dtype: str) -> None:
        self.alpha = alpha
        self.original, self.target = like_parameters(of, 0), like_parameters(of, 0)
        self.sources = [like_parameters(of, 1 + i, DTYPES[source_dtype]) for i in range(sources)]
        self.count = sum(t.numel() for t in self.target)
        self.floor_bytes = 2 * 4 * self.count  # read and write the target, read the sources
        self.floor_bytes += sum(s.numel() * s.element_size() for source in self.sources for s in source)

    def prepare(self) -> list[Tensor]:
        """The target as it was: the last call has overwritten it."""
        torch._foreach_copy_(self.target, self.original)
        return self.target

    def provider(self, name: str, call: Call, **more: Any) -> Provider:
        """Judged by the whole target."""
        return Provider(name, call, self.prepare, lambda target, _: target, **more)

    def ours(self, target: list[Tensor]) -> Any:
        """In one pass."""
        if len(self.sources) == 1:
            return blend_(target, self.sources[0], self.alpha)
        return blend_many_(target, self.sources, self.alpha)

    def by_hand(self, function: Callable[..., Any]) -> Call:
        """The naive code: a single source is given as a list of tensors, several as a list of such lists."""
        given: Any = self.sources if len(self.sources) > 1 else self.sources[0]
        return lambda target: function(target, given, self.alpha)

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

    def case(self, spec: Spec, providers: list[Provider], rooflines: list[Any] | None = None) -> Case:
        """All of it."""
        return Case(
            key=spec.key,
            title=spec.title,
            operation="blend",
            floor_bytes=self.floor_bytes,
            providers=providers,
            error=lambda _, out: oracle.relative_error(
                out, oracle.blend(self.original, self.sources, self.alpha)
            ),
            rooflines=rooflines or [lerp_roofline(self.count)],
            calls_per_round=calls_for(self.count),
            memory_bound=is_memory_bound(self.count),
            about=spec.about,
        )


def build(
    spec: Spec, of: Sequence[tuple[int, ...]], alpha: float, sources: int, source_dtype: str,
    function: Callable[..., Any], kinds: frozenset[str],
) -> Case:  # fmt: skip
    """Everybody over one list of parameters."""
    problem = Problem(of, alpha, sources, source_dtype)
    mixed = source_dtype != "fp32"
    providers = []
    if "naive" in kinds:
        providers.append(problem.provider(NAIVE, problem.by_hand(function)))
    if "compile" in kinds:
        providers.append(problem.provider(COMPILED, problem.by_hand(compiled(function))))
    if "torch" in kinds:
        if mixed or sources > 1:
            providers.append(problem.provider(MUL_ADD, problem.mul_add))
        if not mixed:  # lerp takes one dtype only
            providers.append(problem.provider(LERP if sources == 1 else LERPS, problem.lerps))
        if function is naive.ema and not mixed:
            providers.append(problem.provider(SWA, problem.averaged_model()))
    if "peers" in kinds:
        providers += peer_providers(problem, function)
    if "reference" in kinds and build_info()["cpu_kernels"]:
        around = partial(use_backend, "reference")
        providers.append(problem.provider(REFERENCE, problem.ours, ours=True, around=around))
    providers.append(problem.provider(OURS, problem.ours, ours=True))
    return problem.case(spec, providers)


def peer_providers(problem: Problem, function: Callable[..., Any]) -> list[Provider]:
    """timm where an EMA is asked for, mergekit otherwise; nothing where they are not installed."""
    if function is naive.ema:
        update = peers.timm_ema(problem.target, problem.alpha)
        return [] if update is None else [problem.provider(peers.TIMM, lambda _: update(problem.sources[0]))]
    merge = peers.mergekit_merge(problem.target, problem.sources, problem.alpha)
    return [] if merge is None else [problem.provider(peers.MERGEKIT, lambda _: merge())]


def build_threads(
    spec: Spec, of: Sequence[tuple[int, ...]], alpha: float, sources: int, source_dtype: str,
    function: Callable[..., Any], kinds: frozenset[str],
) -> Case:  # fmt: skip
    """One thread and two, of ours, of the naive code and of the roofline, in the same rounds."""
    problem = Problem(of, alpha, sources, source_dtype)
    providers, rooflines = [], []
    for count in (1, 2):
        around, suffix = partial(threads, count), f", {count} thread{'s' * (count > 1)}"
        rooflines.append(lerp_roofline(problem.count, "a.lerp_(b, w)" + suffix, around))
        judged = {"around": around, "roofline": rooflines[-1].provider.name}
        if "naive" in kinds:
            providers.append(problem.provider(NAIVE + suffix, problem.by_hand(function), **judged))
        providers.append(problem.provider(OURS + suffix, problem.ours, ours=True, **judged))
    return problem.case(spec, providers, rooflines)


def make(title: str, model: str, tags: str, alpha: float, sources: int = 1, function: Callable[..., Any] = naive.ema,
         source_dtype: str = "fp32", builder: Callable[..., Case] = build, group: str = "one") -> Spec:  # fmt: skip
    """A case: `builder` makes it. A tag `compile` races torch.compile in a full run."""
    of = MODELS[model]()
    labels = set(tags.split())
    title = f"{title} {model}" + ", threads" * (builder is build_threads)
    about = {"group": group, "dtype": "mixed" if source_dtype != "fp32" else "fp32", "sources": sources,
             "numbers": shapes.numbers(list(of)), "tensors": len(of)}  # fmt: skip
    spec = Spec(
        key_of(title),
        title,
        "blend",
        lambda _: None,
        frozenset(labels - {"compile"}),
        "compile" in labels,
        about,
    )  # type: ignore[arg-type,return-value]
    arguments = (of, alpha, sources, source_dtype, function)
    return replace(spec, build=lambda kinds: builder(spec, *arguments, kinds))


MODELS: dict[str, Callable[[], shapes.Shapes]] = {
    "ResNet-18": shapes.resnet18,
    "ViT-B/16": shapes.vit_b16,
    "GPT-2": shapes.gpt2,
    "600 small": shapes.small_tensors,
    "8x10": lambda: [(8, 10)],
}


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
        make("blend_ EMA", "ResNet-18", "", 0.999, builder=build_threads, group="threads"),
        make("blend_many_ x4", "ResNet-18", "", **(many | {"group": "threads"}), builder=build_threads),
    ]
