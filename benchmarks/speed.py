"""The speed table: each operation against the code people write today, checked against float64 first.

Run it:  python -m benchmarks.speed [--quick] [--json out.json] [--threads N]

`--quick` leaves out `torch.compile` and takes fewer rounds. Rows where fasttransfer loses stay in the table.
The method is in benchmarks/timing.py, the cases are in benchmarks/cases.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.cases import COMPILED, FOREACH, NAIVE, OURS, folds, table
from benchmarks.display import console_of_width, one_progress
from benchmarks.machine import environment
from benchmarks.timing import measure

ROUNDS = {"full": 40, "quick": 12}
BUSY = 0.15  # cores; above it the figures are marked as those of a shared machine
Step = Callable[[str], None]


def units(quick: bool) -> int:
    """How many cases a run has: the length of its progress bar."""
    return len(table()) + len(folds(quick))


def run(
    quick: bool, advance: Step, say: Step = lambda _: None, seconds: float = float("inf")
) -> dict[str, Any]:
    """Measure every case; `advance` hears of a finished case, `say` of what is going on inside one.

    `seconds` is the time that the rounds of one case may take.
    """
    quieten_inductor()
    rounds = ROUNDS["quick" if quick else "full"]
    results: dict[str, Any] = {"environment": environment(), "quick": quick, "cases": [], "folds": []}
    for where, builders in (("cases", table()), ("folds", folds(quick))):
        for builder in builders:
            say(f"{builder.title}: making tensors")
            results[where].append(measure(builder.build(not quick), rounds, seconds, say))
            torch._dynamo.reset()  # compile once per case: nothing is carried over to the next
            advance(builder.title)
    cases = results["cases"] + results["folds"]
    timing, others = (sum(case[key] for case in cases) for key in ("timing_s", "others_s"))
    results["environment"]["cores_busy_with_others"] = max(0.0, others / timing) if timing else 0.0
    return results


def quieten_inductor() -> None:
    """Keep compiler chatter out of the progress display; a failure to compile is a note in the results."""
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo).*")
    for name in ("torch._inductor", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)


def failures(results: dict[str, Any]) -> list[str]:
    """Every wrong answer, anybody's, and every call of ours that did not run. A time is never a failure."""
    wrong = []
    for case in results["cases"] + results["folds"]:
        ours_only = case["operation"] == "fold"
        for name, provider in case["providers"].items():
            if not provider["ok"] and (provider["ran"] or ours_only or name == OURS):
                wrong.append(f"{case['title']}, {name}: {provider['note']}")
    return wrong


def duration(seconds: float) -> str:
    """Three significant digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def time_of(case: dict[str, Any], name: str) -> str:
    """A provider's median, or why it has none."""
    provider = case["providers"].get(name)
    if provider is None:
        return "[dim]–[/]"
    if "median_s" in provider:
        return duration(provider["median_s"])
    return "[red]wrong[/]" if provider["ran"] else "[yellow]not run[/]"


def speedup(case: dict[str, Any], name: str) -> float | None:
    """How many times faster ours is than `name`: a ratio of medians of the same rounds."""
    other, ours = case["providers"].get(name, {}), case["providers"].get(OURS, {})
    if "median_s" not in other or "median_s" not in ours:
        return None
    return other["median_s"] / ours["median_s"]


def ratio(value: float | None) -> str:
    """A speedup: green from 1.05 on, red below 0.95, plain where it is a tie."""
    if value is None:
        return "[dim]–[/]"
    colour = "green" if value >= 1.05 else "red" if value < 0.95 else "default"
    return f"[{colour}]{value:.3g}x[/]"


def spread(provider: dict[str, Any]) -> str:
    """The interquartile range as a share of the median."""
    if "median_s" not in provider:
        return ""
    return f"±{100 * (provider['q3_s'] - provider['q1_s']) / 2 / provider['median_s']:.0f}%"


def speed_table(results: dict[str, Any]) -> Table:
    """Every case as one line; a best single torch call, where there is one, as a line below it."""
    grid = Table(
        title="Speed: fp32; kd forward + backward, l2sp and blend in place",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    grid.add_column("operation", no_wrap=True)
    for header in ("naive", "compile", "ours", "±", "x naive", "x comp", "GB/s", "roof", "error"):
        grid.add_column(header, justify="right", no_wrap=True)
    for case in results["cases"]:
        ours = case["providers"][OURS]
        bound_by_memory = "of_roofline" in ours
        grid.add_row(
            case["title"],
            time_of(case, NAIVE),
            time_of(case, COMPILED),
            f"[bold]{time_of(case, OURS)}[/]",
            f"[dim]{spread(ours)}[/]",
            ratio(speedup(case, NAIVE)),
            ratio(speedup(case, COMPILED)),
            f"{ours['gb_per_s']:.1f}" if bound_by_memory else "[dim]–[/]",
            f"{100 * ours['of_roofline']:.0f}%" if bound_by_memory else "[dim]–[/]",
            f"[dim]{ours['error']:.0e}[/]" if ours["error"] is not None else "",
        )
        if FOREACH in case["providers"]:
            foreach = ratio(speedup(case, FOREACH))
            grid.add_row(f"  against {FOREACH}", time_of(case, FOREACH), "", "", "", foreach)
    return grid


def fold_table(results: dict[str, Any]) -> Table:
    """The variants of kd against its plain form: all of them ours."""
    grid = Table(
        title="Variants of kd, fasttransfer only, against T=2 in the same rounds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    grid.add_column("shape", no_wrap=True)
    names = list(results["folds"][0]["providers"])
    for name in names:
        grid.add_column(name, justify="right", no_wrap=True)
    for case in results["folds"]:
        plain = case["providers"]["T=2"].get("median_s")
        cells = []
        for name in names:
            median = case["providers"][name].get("median_s")
            share = f" {median / plain - 1:+.0%}" if plain and median and name != "T=2" else ""
            cells.append(time_of(case, name) + share)
        grid.add_row(case["title"].removeprefix("variants "), *cells)
    return grid


def losses_and_ties(results: dict[str, Any]) -> str:
    """The rows that a reader should not have to look for: where a rival is as fast as ours, or faster."""
    lost: list[str] = []
    tied: list[str] = []
    for case in results["cases"]:
        for rival in case["providers"]:
            times = speedup(case, rival) if rival != OURS else None
            if times is not None and times < 1.05:
                (tied if times >= 0.95 else lost).append(f"{case['title']} to {rival} ({times:.2f}x)")
    untimed = [case["title"] for case in results["cases"] if "median_s" not in case["providers"][OURS]]
    lines = [f"Loses: {'; '.join(lost)}." if lost else "Loses nowhere else." if untimed else "Loses nowhere."]
    if untimed:
        lines.insert(0, f"Has no time of its own, because it is wrong or did not run: {'; '.join(untimed)}.")
    if tied:
        lines.append(f"Ties (within 5%): {'; '.join(tied)}.".replace(" to ", " with "))
    return "\n".join(lines)


def headline(results: dict[str, Any]) -> str:
    """How many times faster the first case of each operation is, and in how many rows something else is faster."""
    first: dict[str, str] = {}
    for case in results["cases"]:
        times = speedup(case, NAIVE)
        if times is not None and case["operation"] not in first:
            first[case["operation"]] = f"{case['title']} {times:.3g}x"
    rivals = [
        speedup(case, rival) for case in results["cases"] for rival in case["providers"] if rival != OURS
    ]
    lost = sum(times is not None and times < 0.95 for times in rivals)
    return f"Against the naive code: {', '.join(first.values())}. Something else is faster in {lost} comparisons."


def notes(results: dict[str, Any]) -> str:
    """How to read the table, with what did not run."""
    counts = sorted({case["rounds"] for case in results["cases"]})
    rounds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines = [
        f"Medians of {rounds} interleaved rounds; ±: half the interquartile range; "
        "error: relative, to float64.",
        "naive: benchmarks/naive.py; compile: torch.compile of it, default inductor, static shapes.",
        "roof: share of the GB/s of torch.add(a, b) (kd) or a.lerp_(b, w) (others) in the same rounds.",
    ]
    for case in results["cases"] + results["folds"]:
        for name, provider in case["providers"].items():
            if provider["note"]:
                lines.append(f"{case['title']}, {name}: {provider['note']}")
    return "\n".join(lines) + "\n"


def environment_lines(env: dict[str, Any]) -> str:
    """The environment in two lines."""
    return (
        f"{env['cpu']}, SIMD {env['simd']}, {env['threads']} of {env['cores']} cores, torch {env['torch']}, "
        f"commit {env['commit']}\nGPU: {env['gpu']}"
    )


def busy_warning(env: dict[str, Any]) -> str:
    """Nothing, or that these are not the figures of an idle machine."""
    busy = env["cores_busy_with_others"]
    if busy < BUSY:
        return ""
    return (
        f"Other processes kept {busy:.1f} of {env['cores']} cores busy meanwhile: these times and ratios are "
        "not this machine's."
    )


def renderables(results: dict[str, Any]) -> list[RenderableType]:
    """The whole of a run, to print in this order."""
    return [
        speed_table(results),
        Text(losses_and_ties(results)),
        Text(notes(results), style="dim"),
        fold_table(results),
        Text(environment_lines(results["environment"]), style="dim"),
        Text(busy_warning(results["environment"]), style="bold yellow"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if anything computed a wrong answer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, without torch.compile")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, help="threads of every provider (default: torch's own)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = console_of_width()
    with one_progress(console) as progress:
        bar = progress.add_task("speed", total=units(options.quick), now="")
        results = run(
            options.quick,
            lambda title: progress.advance(bar),
            lambda what: progress.update(bar, now=what),
        )
        progress.update(bar, now="done")
    for part in renderables(results):
        console.print(part)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    wrong = failures(results)
    for line in wrong:
        console.print(Text(f"WRONG: {line}", style="bold red"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
