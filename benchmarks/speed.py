"""The speed table: each operation against the code people write today, checked against float64 first.

Run it:  python -m benchmarks.speed [--quick] [--threads N]

These are the cases tagged `demo` in benchmarks/cases; `make bench` measures all of them. `--quick` leaves out
`torch.compile` and takes fewer rounds. Rows where fasttransfer loses stay in the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks import figures, peers
from benchmarks.cases import COMPILED, NAIVE, OURS, select
from benchmarks.display import console_of_width, one_progress
from benchmarks.figures import headline, median, speedup
from benchmarks.machine import environment
from benchmarks.results import failures, result_of
from benchmarks.suite import EFFORTS, kinds_for, quieten_inductor
from benchmarks.timing import measure

QUICK_ROUNDS = 12
Step = Callable[[str], None]

__all__ = ["failures", "headline", "renderables", "run", "units"]


def units(quick: bool) -> int:
    """How many cases a run has: the length of its progress bar."""
    return len(select("demo"))


def run(
    quick: bool, advance: Step, say: Step = lambda _: None, seconds: float = float("inf")
) -> dict[str, Any]:
    """Measure every case; `advance` hears of a finished case, `say` of what is going on inside one.

    `seconds` is the time that the rounds of one case may take.
    """
    quieten_inductor()
    effort = EFFORTS["demo"]
    kinds, rounds = (effort.kinds - {"compile"}, QUICK_ROUNDS) if quick else (effort.kinds, effort.rounds)
    cases = []
    for spec in select("demo"):
        say(f"{spec.title}: making tensors")
        cases.append(measure(spec.build(kinds_for(spec, kinds)), rounds, seconds, say))
        torch._dynamo.reset()  # compile once per case: nothing is carried over to the next
        advance(spec.title)
    return result_of(cases, "demo, quick" if quick else "demo", environment(), peers.absent())


def time_of(case: dict[str, Any], name: str) -> str:
    """A provider's median, or why it has none."""
    return figures.cell(case, name, ("[dim]–[/]", "[red]wrong[/]", "[yellow]not run[/]"))


def grid_of(title: str, first: str, others: Iterable[str]) -> Table:
    """An empty table: one column of names, then columns of figures."""
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    grid.add_column(first, no_wrap=True)
    for header in others:
        grid.add_column(header, justify="right", no_wrap=True)
    return grid


def ratio(value: float | None) -> str:
    """A speedup: green where ours is faster, red where it is slower, plain where it is a tie."""
    if value is None:
        return "[dim]–[/]"
    faster, slower = value >= 1 + figures.TIE, value < 1 - figures.TIE
    return f"[{'green' if faster else 'red' if slower else 'default'}]{value:.3g}x[/]"


def speed_table(result: dict[str, Any]) -> Table:
    """Every case as one line; the best of torch's own calls, where there is one, as a line below it."""
    grid = grid_of(
        "Speed: kd forward + backward, l2sp and blend in place; fp32 where nothing else is said",
        "operation",
        ("naive", "compile", "ours", "±", "x naive", "x comp", "roof", "error"),
    )
    for case in figures.plain(result["cases"]):
        ours = case["providers"][OURS]
        spread = figures.spread(ours)
        grid.add_row(
            case["title"],
            time_of(case, NAIVE),
            time_of(case, COMPILED),
            f"[bold]{time_of(case, OURS)}[/]",
            "" if spread is None else f"[dim]±{100 * spread:.0f}%[/]",
            ratio(speedup(case, NAIVE)),
            ratio(speedup(case, COMPILED)),
            f"{100 * ours['of_roofline']:.0f}%" if "of_roofline" in ours else "[dim]–[/]",
            f"[dim]{ours['error']:.0e}[/]" if ours["error"] is not None else "",
        )
        if other := figures.best_other(case):
            grid.add_row(f"  {other}", time_of(case, other), "", "", "", ratio(speedup(case, other)))
    return grid


def variants_table(result: dict[str, Any]) -> Table:
    """The variants of kd against its plain form: all of them ours."""
    cases = [case for case in result["cases"] if case["about"]["group"] == "variants"]
    names = list(cases[0]["providers"])
    grid = grid_of("Variants of kd, fasttransfer only, against T=2 in the same rounds", "shape", names)
    for case in cases:
        base = median(case, "T=2")
        cells = []
        for name in names:
            own = median(case, name)
            share = f" {own / base - 1:+.0%}" if base and own and name != "T=2" else ""
            cells.append(time_of(case, name) + share)
        grid.add_row(case["title"].partition(",")[0], *cells)
    return grid


def losses_and_ties(result: dict[str, Any]) -> str:
    """The rows that a reader should not have to look for: where a rival is as fast as ours, or faster."""
    lost, tied = figures.lost_and_tied(result["cases"])
    untimed = figures.untimed(result["cases"])
    lines = [f"Loses: {'; '.join(lost)}." if lost else "Loses nowhere else." if untimed else "Loses nowhere."]
    if untimed:
        lines.insert(0, f"Has no time of its own, because it is wrong or did not run: {'; '.join(untimed)}.")
    if tied:
        lines.append(f"Ties (within 5%): {'; '.join(tied)}.".replace(" to ", " with "))
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> str:
    """How to read the table, with what did not run."""
    counts = sorted({case["rounds"] for case in result["cases"]})
    rounds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines = [
        f"Medians of {rounds} interleaved rounds; ±: half the interquartile range; "
        "error: relative, to float64.",
        "naive: benchmarks/naive.py; compile: torch.compile of it, default inductor, static shapes.",
        "roof: share of the GB/s of torch.add(a, b) (kd) or a.lerp_(b, w) (others) in the same rounds.",
    ]
    for case in result["cases"]:
        for name, provider in case["providers"].items():
            if provider["note"]:
                lines.append(f"{case['title']}, {name}: {provider['note']}")
    return "\n".join(lines) + "\n"


def renderables(result: dict[str, Any]) -> list[RenderableType]:
    """The whole of a run, to print in this order."""
    return [
        speed_table(result),
        Text(losses_and_ties(result)),
        Text(notes(result), style="dim"),
        variants_table(result),
        Text(figures.environment_line(result["environment"]), style="dim"),
        Text(figures.busy_warning(result["environment"]), style="bold yellow"),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if anything of ours computed a wrong answer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, without torch.compile")
    parser.add_argument("--threads", type=int, help="threads of every provider (default: torch's own)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = console_of_width()
    with one_progress(console) as progress:
        bar = progress.add_task("speed", total=units(options.quick), now="")
        result = run(
            options.quick,
            lambda title: progress.advance(bar),
            lambda what: progress.update(bar, now=what),
        )
        progress.update(bar, now="done")
    for part in renderables(result):
        console.print(part)
    wrong = failures(result)
    for line in wrong:
        console.print(Text(f"WRONG: {line}", style="bold red"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
