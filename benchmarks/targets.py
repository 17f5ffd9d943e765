"""What the project set out to reach on a machine of two cores with AVX-512, beside what was measured.

They are figures of a report, not tests: a time never fails anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.cases.common import COMPILED, NAIVE, OURS
from benchmarks.figures import best_other, median, percent, speedup, times

Cases = dict[str, dict[str, Any]]
ONE, TWO = f"{OURS}, 1 thread", f"{OURS}, 2 threads"
AVX512, AVX2, BASELINE = (f"{OURS}, {level}" for level in ("avx512", "avx2", "baseline"))


@dataclass(frozen=True)
class Target:
    """A figure, and what it must be at least (or at most)."""

    what: str
    required: float
    measured: Callable[[Cases], float | None]
    show: Callable[[float | None, int], str] = times
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether it is reached."""
        return value <= self.required if self.at_most else value >= self.required

    def bound(self) -> str:
        """What is required, in words."""
        return ("at most " if self.at_most else "") + self.show(self.required, 0)

    def shown(self, value: float) -> str:
        """With a digit more than in other tables, or as many as it takes for the verdict to follow from them."""
        texts = [self.show(value, more) for more in range(1, 8)]
        return next((text for text in texts if self.met(_read(text)) == self.met(value)), texts[-1])


def _read(text: str) -> float:
    """The number that `times` or `percent` wrote."""
    return float(text[:-1]) / (100 if text.endswith("%") else 1)


def _roofline(key: str, required: float, provider: str = OURS) -> Target:
    def share(cases: Cases) -> float | None:
        found: float | None = cases[key]["providers"].get(provider, {}).get("of_roofline")
        return found

    who = "" if provider == OURS else provider.removeprefix(OURS)
    return Target(f"{key}{who}: share of the roofline", required, share, percent)


def _against(key: str, rival: str, required: float) -> Target:
    return Target(f"{key}: against {rival}", required, lambda cases: speedup(cases[key], rival))


def _against_best(key: str, required: float) -> Target:
    def value(cases: Cases) -> float | None:
        other = best_other(cases[key])
        return speedup(cases[key], other) if other else None

    return Target(f"{key}: against the best of torch's own calls", required, value)


def _second_thread(key: str) -> Target:
    def value(cases: Cases) -> float | None:
        case = cases[key]
        one, two = median(case, ONE), median(case, TWO)
        first, second = (roofline["median_s"] for roofline in case["rooflines"].values())
        return one / two / (first / second) if one and two else None

    return Target(f"{key}: speedup by the second thread over the roofline call's own", 0.9, value)


def _faster_than_own(key: str, other: str) -> Target:
    def value(cases: Cases) -> float | None:
        own, slower = median(cases[key], OURS), median(cases[other], OURS)
        return slower / own if own and slower else None

    return Target(f"{key}: against our own {other}", 1.0, value)


def _kd() -> Iterable[Target]:
    for size in ("256x32000", "64x128256"):
        yield _roofline(f"kd_{size}", 0.80)
        yield _against(f"kd_{size}", NAIVE, 18)
        yield _against(f"kd_{size}", COMPILED, 5)
    yield _against("kd_1024x1000", NAIVE, 15)
    yield _against("kd_1024x1000", COMPILED, 6)
    for size in ("256x32000", "64x128256", "1024x1000"):
        yield _against(f"kd_labels_{size}", NAIVE, 20)
    for size in ("256x32000", "64x128256", "1024x1000"):
        yield _against(f"kd_{size}_bf16", NAIVE, 15)
        yield _against(f"kd_{size}_bf16", COMPILED, 7)
        yield _faster_than_own(f"kd_{size}_bf16", f"kd_{size}")
    for divergence in ("reverse_kl", "jsd", "tvd"):
        yield _against(f"kd_{divergence}_256x32000", NAIVE, 8)
        yield _against(f"kd_{divergence}_256x32000", COMPILED, 2.5)
    yield _against("kd_topk_64_256x32000", "kd_loss, all columns", 1)
    for size in ("256x32000", "64x128256", "1024x1000"):
        yield _roofline(f"kd_forward_{size}", 0.85)


def _lists() -> Iterable[Target]:
    for model in ("ResNet-18", "ViT-B16"):
        yield _roofline(f"l2sp_add_grad_{model}", 0.90)
        yield _against(f"l2sp_add_grad_{model}", NAIVE, 8)
        yield _against(f"l2sp_add_grad_{model}", COMPILED, 3)
    yield _against("l2sp_add_grad_600_small", NAIVE, 20)
    for model in ("ResNet-18", "ViT-B16"):
        yield _roofline(f"blend_many_x4_{model}", 0.90)
        yield _against_best(f"blend_many_x4_{model}", 1.6)
        yield _against(f"blend_EMA_{model}", "_foreach_lerp_", 0.95)
        yield _against(f"blend_bf16_into_fp32_{model}", NAIVE, 2)


def _levels_and_threads() -> Iterable[Target]:
    for key in (
        "kd_256x32000_SIMD_levels",
        "kd_256x32000_bf16_SIMD_levels",
        "l2sp_add_grad_ResNet-18_SIMD_levels",
    ):
        yield Target(f"{key}: speed of avx2, of avx512's", 0.5,
                     lambda cases, key=key: speedup(cases[key], AVX512, AVX2), percent)  # fmt: skip
        yield Target(f"{key}: baseline against naive", 1.0,
                     lambda cases, key=key: speedup(cases[key], NAIVE, BASELINE))  # fmt: skip
    for key in ("kd_256x32000_threads", "kd_64x128256_threads", "l2sp_add_grad_ResNet-18_threads",
                "blend_many_x4_ResNet-18_threads"):  # fmt: skip
        yield _second_thread(key)
        yield _roofline(key, 0.70, ONE)


def _overall() -> Iterable[Target]:
    def least(cases: Cases) -> float | None:
        groups = ("forward+backward", "labels", "scan")
        values = [speedup(case, NAIVE) for case in cases.values() if case["about"].get("group") in groups]
        known = [value for value in values if value is not None]
        return min(known) if known else None

    def wide(cases: Cases) -> float | None:
        per_logit = []
        for rows, vocab in ((31, 262144), (254, 32000)):
            value = median(cases[f"kd_{rows}x{vocab}"], OURS)
            if value is None:
                return None
            per_logit.append(value / (rows * vocab))
        return per_logit[0] / per_logit[1]

    yield Target("every kd case forward + backward: the least against naive", 1.0, least)
    yield Target("cost per logit at 262,144 columns over that at 32,000", 1.25, wide, at_most=True)


TARGETS = [*_kd(), *_lists(), *_levels_and_threads(), *_overall()]


def rows(cases: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Target, required, measured, met; without those whose cases were not measured."""
    known = {case["key"]: case for case in cases}
    found = []
    for target in TARGETS:
        try:
            value = target.measured(known)
        except KeyError:
            continue
        if value is not None:
            verdict = "yes" if target.met(value) else "**no**"
            found.append([target.what, target.bound(), target.shown(value), verdict])
    return found
