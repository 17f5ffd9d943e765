"""What the tables and plots say of a case: ratios, spreads, shares, in words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.cases.common import COMPILED, NAIVE, OURS

TIE = 0.05  # within 5% of each other two medians are called a tie
NO_TIME = ("–", "**wrong**", "did not run")  # in Markdown
BUSY = 0.15  # cores; above it the figures are marked as those of a shared machine


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:  # what rounds to 1000 of a unit is 1 of the next
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def size(count: float | None) -> str:
    """Bytes in a unit that suits."""
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def times(value: float | None, more: int = 0) -> str:
    """A ratio; `more` digits than the tables show."""
    return "–" if value is None else f"{value:.{3 + more}g}x"


def percent(value: float | None, more: int = 0) -> str:
    """A share; `more` digits than the tables show."""
    return "–" if value is None else f"{100 * value:.{more}f}%"


def median(case: dict[str, Any], name: str) -> float | None:
    """A provider's median, if it has one."""
    found: float | None = case["providers"].get(name, {}).get("median_s")
    return found


def cell(case: dict[str, Any], name: str, says: tuple[str, str, str] = NO_TIME) -> str:
    """A provider's median, or why it has none: it is not there, it is wrong, it did not run."""
    absent, wrong, failed = says
    provider = case["providers"].get(name)
    if provider is None:
        return absent
    if "median_s" in provider:
        return duration(provider["median_s"])
    return wrong if provider["ran"] else failed


def speedup(case: dict[str, Any], rival: str, ours: str = OURS) -> float | None:
    """How many times faster ours is than the rival: a ratio of medians of the same rounds."""
    other, own = median(case, rival), median(case, ours)
    return other / own if other is not None and own is not None else None


def spread(record: dict[str, Any]) -> float | None:
    """Half the interquartile range as a share of the median."""
    if "median_s" not in record:
        return None
    return float((record["q3_s"] - record["q1_s"]) / 2 / record["median_s"])


def best_other(case: dict[str, Any]) -> str | None:
    """The fastest that is neither ours nor the naive code nor its compiled form: torch's own calls, peers."""
    others = {
        name: provider["median_s"]
        for name, provider in case["providers"].items()
        if not provider["ours"] and name not in (NAIVE, COMPILED) and "median_s" in provider
    }
    return min(others, key=lambda name: others[name]) if others else None


def plain(cases: Iterable[dict[str, Any]], *groups: str) -> list[dict[str, Any]]:
    """Cases in which `fasttransfer` as it comes races others, of these groups or of all."""
    return [c for c in cases if OURS in c["providers"] and (not groups or c["about"]["group"] in groups)]


def lost_and_tied(cases: Iterable[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """The rows that a reader should not have to look for: where somebody is faster than ours, or as fast."""
    lost, tied = [], []
    for case in plain(cases):
        for rival, provider in case["providers"].items():
            value = None if provider["ours"] else speedup(case, rival)
            if value is not None and value < 1 + TIE:
                (tied if value >= 1 - TIE else lost).append(f"{case['title']} to {rival} ({value:.2f}x)")
    return lost, tied


def untimed(cases: Iterable[dict[str, Any]]) -> list[str]:
    """Ours, where it is wrong or did not run."""
    return [c["title"] for c in plain(cases) if median(c, OURS) is None]


def headline(result: dict[str, Any]) -> str:
    """How many times faster the first case of each operation is, and in how many comparisons something else is."""
    first: dict[str, str] = {}
    for case in plain(result["cases"]):
        value = speedup(case, NAIVE)
        if value is not None and case["operation"] not in first:
            first[case["operation"]] = f"{case['title']} {value:.3g}x"
    lost = len(lost_and_tied(result["cases"])[0])
    return f"Against the naive code: {', '.join(first.values())}. Something else is faster in {lost} comparisons."


def busy_warning(environment: dict[str, Any]) -> str:
    """Nothing, or that these are not the figures of an idle machine."""
    busy = environment["cores_busy_with_others"]
    if busy < BUSY:
        return ""
    return (
        f"Other processes kept {busy:.1f} of {environment['cores']} cores busy meanwhile: these times and ratios are "
        "not this machine's."
    )


def environment_line(env: dict[str, Any]) -> str:
    """Processor, SIMD level, threads, torch, commit, GPU."""
    return (
        f"{env['cpu']}, SIMD {env['simd']}, {env['threads']} of {env['cores']} cores, torch {env['torch']}, "
        f"commit {env['commit']}; GPU: {env['gpu']}"
    )


def linear_fit(points: Iterable[tuple[float, float]]) -> tuple[float, float, float]:
    """`y = a + b x`, best in relative error so that small sizes count as much: a, b, the worst relative residual."""
    known = list(points)
    sums = [0.0] * 5
    for x, y in known:
        weight = 1.0 / (y * y)
        for place, term in enumerate((1.0, x, x * x, y, x * y)):
            sums[place] += weight * term
    one, x1, x2, y1, xy = sums
    b = (one * xy - x1 * y1) / (one * x2 - x1 * x1)
    a = (y1 - b * x1) / one
    return a, b, max(abs(a + b * x - y) / y for x, y in known)
