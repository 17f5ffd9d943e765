"""What a case of any operation is made of: a problem of one size, and who computes it in which settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.cases.common import (
    COMPILED,
    NAIVE,
    OURS,
    REFERENCE,
    Spec,
    calls_for,
    compiled,
    is_memory_bound,
    lerp_roofline,
    threads,
)
from benchmarks.timing import Case, Provider, Roofline
from fasttransfer import build_info, simd_level, simd_levels, use_backend

Call = Callable[[Any], Any]


class Problem(ABC):
    """The tensors of one size, the exact answer, and how a call becomes a provider.

    `everybody`, `by_threads` and `by_level` are the builders of cases that every operation has.
    """

    numbers: int  # elements of one operand: many or few decides how it is timed
    floor_bytes: int
    naive: Callable[..., Any]  # the code people write
    dtype = "fp32"

    @abstractmethod
    def provider(self, name: str, call: Call, **more: Any) -> Provider:
        """A call, and what it is judged by."""

    @abstractmethod
    def by_hand(self, function: Callable[..., Any]) -> Call:
        """A call of the naive code, or of a function of its arguments."""

    @abstractmethod
    def ours(self) -> Call:
        """A call of fasttransfer."""

    @abstractmethod
    def error(self, outputs: Sequence[Tensor]) -> float:
        """How far from float64 the outputs of a provider are."""

    def others(self, kinds: frozenset[str]) -> list[Provider]:
        """torch's own best calls and other libraries."""
        return []

    def roofline(self, suffix: str = "", **more: Any) -> Roofline:
        """The plain torch call with the same reads and writes."""
        return lerp_roofline(self.numbers, suffix, **more)

    def naive_if(self, kinds: frozenset[str], suffix: str = "", **more: Any) -> list[Provider]:
        """The naive code, if it is asked for."""
        return [self.provider(NAIVE + suffix, self.by_hand(self.naive), **more)] if "naive" in kinds else []

    def our_own(self, suffix: str = "", **more: Any) -> Provider:
        """Ours, as it comes or in a setting."""
        return self.provider(OURS + suffix, self.ours(), ours=True, **more)

    def everybody(self, spec: Spec, kinds: frozenset[str]) -> Case:
        """The plain case: everybody who computes it."""
        providers = self.naive_if(kinds)
        if "compile" in kinds:
            providers.append(self.provider(COMPILED, self.by_hand(compiled(self.naive))))
        providers += self.others(kinds)
        if "reference" in kinds and build_info()["cpu_kernels"]:
            around = partial(use_backend, "reference")
            providers.append(self.provider(REFERENCE, self.ours(), ours=True, around=around))
        return self.case(spec, [*providers, self.our_own()])

    def by_threads(self, spec: Spec, kinds: frozenset[str]) -> Case:
        """One thread and two, of ours, of the naive code and of the roofline, in the same rounds."""
        providers, rooflines = [], []
        for count in (1, 2):
            around, suffix = partial(threads, count), f", {count} thread{'s' * (count > 1)}"
            rooflines.append(self.roofline(suffix, around=around))
            judged = {"around": around, "roofline": rooflines[-1].provider.name}
            providers += [*self.naive_if(kinds, suffix, **judged), self.our_own(suffix, **judged)]
        return self.case(spec, providers, rooflines)

    def by_level(self, spec: Spec, kinds: frozenset[str]) -> Case:
        """Every SIMD level this machine has, and the naive code."""
        levels = [self.our_own(f", {level}", around=partial(simd_level, level)) for level in simd_levels()]
        return self.case(spec, self.naive_if(kinds) + levels)

    def case(self, spec: Spec, providers: list[Provider], rooflines: list[Roofline] | None = None) -> Case:
        """All of it."""
        return Case(
            key=spec.key,
            title=spec.title,
            operation=spec.operation,
            floor_bytes=self.floor_bytes,
            providers=providers,
            error=lambda _, outputs: self.error(outputs),
            rooflines=rooflines or [self.roofline()],
            dtype=self.dtype,
            calls_per_round=calls_for(self.numbers),
            memory_bound=is_memory_bound(self.numbers),
            about=spec.about,
        )
