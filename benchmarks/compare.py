"""What moved between two results: ratios of medians per case and provider, and which are beyond the spread."""

from __future__ import annotations

from typing import Any

from benchmarks.cases.common import OURS
from benchmarks.figures import duration, environment_line, times
from benchmarks.report import table, titled

LEAST = 0.05  # below this share nothing has moved, however small the spread


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Markdown: what moved, then every case of both, then what is only in one, and what is no longer right."""
    cases_before, cases_after = ({c["key"]: c for c in result["cases"]} for result in (before, after))
    common = [key for key in cases_before if key in cases_after]
    moves = [move for key in common for move in _moves(cases_before[key], cases_after[key])]
    moved = [move for move in moves if move["moved"]]
    ours = [move for move in moved if move["ours"]]
    faster = sum(move["ratio"] > 1 for move in ours)
    parts = [
        "# Benchmark comparison",
        f"before: {environment_line(before['environment'])}  \nafter: {environment_line(after['environment'])}",
        _warning(before["environment"], after["environment"]),
        f"{len(common)} cases in both. Of ours, beyond the spread: {faster} faster, {len(ours) - faster} slower.",
        titled("Moved beyond the spread", _table(moved)),
        titled("All of ours", _table([move for move in moves if move["ours"]])),
        _only("Only before", cases_before, cases_after),
        _only("Only after", cases_after, cases_before),
        titled("No longer right, or no longer running", "\n".join(_broken(cases_before, cases_after))),
    ]
    return "\n\n".join(part for part in parts if part)


def _moves(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """One per provider that has a time in both; the roofline's own ratio beside it says how much is the machine's."""
    roof = [next(iter(case["rooflines"].values()), None) for case in (before, after)]
    machine = roof[0]["median_s"] / roof[1]["median_s"] if roof[0] and roof[1] else None
    found = []
    for name, old in before["providers"].items():
        new = after["providers"].get(name, {})
        if "median_s" in old and "median_s" in new:
            ratio = old["median_s"] / new["median_s"]
            found.append(
                {"title": before["title"], "name": name, "ours": old["ours"], "old": old, "new": new, "ratio": ratio,
                 "machine": machine, "moved": beyond_spread(old, new)}
            )  # fmt: skip
    return found


def beyond_spread(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """The quartiles do not overlap, and the medians differ by more than a twentieth."""
    apart = old["q1_s"] > new["q3_s"] or new["q1_s"] > old["q3_s"]
    return bool(apart and abs(old["median_s"] / new["median_s"] - 1) > LEAST)


def _table(moves: list[dict[str, Any]]) -> str:
    rows = [
        [m["title"], f"**{m['name']}**" if m["name"] == OURS else m["name"], duration(m["old"]["median_s"]),
         duration(m["new"]["median_s"]), times(m["ratio"]) + ("" if m["moved"] else " ~"), times(m["machine"])]
        for m in sorted(moves, key=lambda m: m["ratio"])
    ]  # fmt: skip
    headers = ["case", "who", "before", "after", "speedup (~: within the spread)", "roofline call's own"]
    return table(headers, rows)


def _warning(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Nothing, or that the two are not of one machine, or not of one setting of it."""
    warnings = []
    machines = [f"{env['cpu']}, {env['cores']} cores" for env in (before, after)]
    if machines[0] != machines[1]:
        warnings.append(
            f"> **Different machines: {machines[0]}, and {machines[1]}.** Ratios are of machines, not of code."
        )
    differ = [key for key in ("threads", "simd", "torch") if before[key] != after[key]]
    if differ:
        warnings.append(f"> **Not like for like: {', '.join(differ)} differ.** Ratios are not of code alone.")
    return "\n>\n".join(warnings)


def _only(title: str, these: dict[str, Any], others: dict[str, Any]) -> str:
    return titled(title, ", ".join(case["title"] for key, case in these.items() if key not in others))


def _broken(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"- {case['title']}, {name}: {after[key]['providers'][name]['note']}"
        for key, case in before.items()
        if key in after
        for name, provider in case["providers"].items()
        if provider["ok"] and name in after[key]["providers"] and not after[key]["providers"][name]["ok"]
    ]
