"""The cases of L2-SP: value and gradient of the penalty, added to gradients that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, oracle, shapes
from benchmarks.cases.common import (
    COMPILED,
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
from fasttransfer import build_info, l2sp_add_grad_, simd_level, simd_levels, use_backend

STRENGTH = 0.01
HAD = 0.003  # every gradient before the call: what backward of a data loss left there
FOREACH = "_foreach calls"
Call = Callable[[list[Tensor]], Tensor]


class Problem:
    """Parameters with gradients, their start, and how a call becomes a provider."""

    def __init__(self, of: Sequence[tuple[int, ...]]) -> None:
        self.params = [p.requires_grad_(True) for p in like_parameters(of, 0)]
        self.start = like_parameters(of, 1)
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.count = sum(p.numel() for p in self.params)

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

    def ours(self, params: list[Tensor]) -> Tensor:
        """In one pass, without a graph."""
        return l2sp_add_grad_(params, self.start, STRENGTH)

    def through_autograd(self, penalty: Callable[..., Any]) -> Call:
        """A penalty as a loss term: its backward adds to the gradients."""

        def value_and_grad(params: list[Tensor]) -> Tensor:
            loss = penalty(params, self.start, STRENGTH)
            loss.backward()
            return loss

        return value_and_grad

    @torch.no_grad()
    def foreach(self, params: list[Tensor]) -> Tensor:
        """What torch's own list operations make of it, without a graph: the most a careful user writes."""
        distance = torch._foreach_sub(params, self.start)
        torch._foreach_add_([p.grad for p in params], distance, alpha=2.0 * STRENGTH)
        return STRENGTH * torch.stack(torch._foreach_powsum(distance, 2)).sum()

    def case(self, spec: Spec, providers: list[Provider], rooflines: list[Any] | None = None) -> Case:
        """All of it."""
        detached = [p.detach() for p in self.params]
        return Case(
            key=spec.key,
            title=spec.title,
            operation="l2sp",
            floor_bytes=4 * 4 * self.count,  # read p, p0 and the gradient, write the gradient
            providers=providers,
            error=lambda _, out: oracle.relative_error(out, oracle.l2sp(detached, self.start, HAD, STRENGTH)),
            rooflines=rooflines or [lerp_roofline(self.count)],
            calls_per_round=calls_for(self.count),
            memory_bound=is_memory_bound(self.count),
            about=spec.about,
        )


def build(spec: Spec, of: Sequence[tuple[int, ...]], kinds: frozenset[str]) -> Case:
    """Everybody over one list of parameters."""
    problem = Problem(of)
    providers = []
    if "naive" in kinds:
        providers.append(problem.provider(NAIVE, problem.through_autograd(naive.l2sp)))
    if "compile" in kinds:
        providers.append(problem.provider(COMPILED, problem.through_autograd(compiled(naive.l2sp))))
    if "torch" in kinds:
        providers.append(problem.provider(FOREACH, problem.foreach))
    if "reference" in kinds and build_info()["cpu_kernels"]:
        around = partial(use_backend, "reference")
        providers.append(problem.provider(REFERENCE, problem.ours, ours=True, around=around))
    providers.append(problem.provider(OURS, problem.ours, ours=True))
    return problem.case(spec, providers)


def build_threads(spec: Spec, of: Sequence[tuple[int, ...]], kinds: frozenset[str]) -> Case:
    """One thread and two, of ours, of the naive code and of the roofline, in the same rounds."""
    problem = Problem(of)
    providers, rooflines = [], []
    for count in (1, 2):
        around, suffix = partial(threads, count), f", {count} thread{'s' * (count > 1)}"
        rooflines.append(lerp_roofline(problem.count, "a.lerp_(b, w)" + suffix, around))
        judged = {"around": around, "roofline": rooflines[-1].provider.name}
        if "naive" in kinds:
            call = problem.through_autograd(naive.l2sp)
            providers.append(problem.provider(NAIVE + suffix, call, **judged))
        providers.append(problem.provider(OURS + suffix, problem.ours, ours=True, **judged))
    return problem.case(spec, providers, rooflines)


def build_simd(spec: Spec, of: Sequence[tuple[int, ...]], kinds: frozenset[str]) -> Case:
    """Every SIMD level this machine has, and the naive code."""
    problem = Problem(of)
    call = problem.through_autograd(naive.l2sp)
    providers = [problem.provider(NAIVE, call)] if "naive" in kinds else []
    for level in simd_levels():
        around = partial(simd_level, level)
        providers.append(problem.provider(f"{OURS}, {level}", problem.ours, ours=True, around=around))
    return problem.case(spec, providers)


def make(
    title: str, builder: Callable[..., Case], of: Sequence[tuple[int, ...]], tags: str, **about: Any
) -> Spec:
    """A case: `builder(spec, shapes, kinds)` makes it. A tag `compile` races torch.compile in a full run."""
    labels = set(tags.split())
    about = {"dtype": "fp32", "numbers": shapes.numbers(list(of)), "tensors": len(of), **about}
    spec = Spec(
        key_of(title),
        title,
        "l2sp",
        lambda _: None,
        frozenset(labels - {"compile"}),
        "compile" in labels,
        about,
    )  # type: ignore[arg-type,return-value]
    return replace(spec, build=lambda kinds: builder(spec, of, kinds))


def specs() -> list[Spec]:
    """All cases of l2sp."""
    # No torch.compile over 600 tensors: one compilation takes minutes.
    listed = [
        make("l2sp_add_grad_ ResNet-18", build, shapes.resnet18(), "compile demo quick smoke", group="l2sp"),
        make("l2sp_add_grad_ ViT-B/16", build, shapes.vit_b16(), "compile", group="l2sp"),
        make("l2sp_add_grad_ GPT-2", build, shapes.gpt2(), "", group="l2sp"),
        make("l2sp_add_grad_ 600 small", build, shapes.small_tensors(), "quick", group="l2sp"),
        make("l2sp_add_grad_ 8x10", build, [(8, 10)], "demo quick", group="l2sp"),
        make("l2sp_add_grad_ ResNet-18, threads", build_threads, shapes.resnet18(), "quick", group="threads"),
    ]
    if simd_levels():
        listed.append(
            make(
                "l2sp_add_grad_ ResNet-18, SIMD levels", build_simd, shapes.resnet18(), "quick", group="simd"
            )
        )
    return listed
