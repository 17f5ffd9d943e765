"""What an example says of itself, so that the demo can run it beside others, and how one of them runs alone.

A part is a module; the demo only needs to know how long its progress bar is, how to run it, and what came
out. To add one, write the module and add its `PART` to the list in examples/demo.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.text import Text

from benchmarks.display import console_of_width, one_progress
from benchmarks.machine import environment


class Reporter:
    """One line of a progress display, for the part that it belongs to."""

    def __init__(self, display: Progress, title: str, units: int) -> None:
        self._display, self._task = display, display.add_task(title, total=units, now="", start=False)

    def say(self, what: str) -> None:
        """What is happening now, in a few words; the first call starts the clock of the line."""
        self._display.start_task(self._task)
        self._display.update(self._task, now=what)

    def advance(self) -> None:
        """One unit of work is done."""
        self._display.advance(self._task)


@dataclass(frozen=True)
class Outcome:
    """What a part found: in a sentence, for the terminal, for JSON, and what misbehaved."""

    headline: str
    tables: list[RenderableType]
    results: dict[str, Any]
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """One part of the demo."""

    key: str  # its name in results.json
    title: str
    units: Callable[[bool], int]  # quick -> how many times run() will advance the progress
    run: Callable[[bool, Reporter], Outcome]  # (quick, reporter)
    about: str  # a module's docstring: what is done, with which controls
    plot: Callable[[dict[str, Any], Path], Path] | None = None  # (results, directory) -> the image written


def run_alone(part: Part, arguments: list[str] | None = None) -> int:
    """The command line of a single example; 1 if a control misbehaves."""
    parser = argparse.ArgumentParser(description=part.title)
    parser.add_argument("--quick", action="store_true", help="a short form: fewer seeds or rounds")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results there as JSON")
    if part.plot:
        parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the plot there as PNG")
    options = parser.parse_args(arguments)
    quick = options.quick
    console = console_of_width()
    with one_progress(console) as display:
        reporter = Reporter(display, part.title, part.units(quick))
        outcome = part.run(quick, reporter)
        reporter.say("done")
    if options.save:
        saved = {"environment": environment(), "quick": quick, "results": outcome.results}
        options.save.write_text(json.dumps(saved, indent=1) + "\n")
    if part.plot and options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        part.plot(outcome.results, options.plots)
    return report(outcome, console)


def report(outcome: Outcome, console: Console) -> int:
    """Print the tables of a part and what misbehaved in it; 1 if anything did."""
    console.print(Text(outcome.headline, style="bold"))
    for table in outcome.tables:
        console.print(table)
    for line in outcome.failures:
        console.print(Text(f"FAILED: {line}", style="bold red"))
    return 1 if outcome.failures else 0
