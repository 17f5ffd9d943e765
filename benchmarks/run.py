"""`python -m benchmarks run`: the suite with a progress bar, then its report."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.conftest import SAY
from benchmarks.display import console_of_width, one_progress
from benchmarks.figures import busy_warning, headline
from benchmarks.report import write
from benchmarks.results import COMMITTED, compact, failures, save

HERE = Path(__file__).resolve().parent


class Display:
    """A plugin of pytest: one line with a bar, in place of its own output."""

    def __init__(self, progress: Progress, tag: str) -> None:
        self._progress, self._task = progress, TaskID(0)
        self._task = progress.add_task(f"bench {tag}", total=None, now="")

    def pytest_configure(self, config: pytest.Config) -> None:
        """Tell the cases where to say what happens."""
        config.stash[SAY] = self.say

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many there are."""
        self._progress.update(self._task, total=len(session.items))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """One less to go. In a log, which has no bar that moves, a line."""
        self._progress.advance(self._task)
        if not self._progress.console.is_terminal:
            self._progress.console.print(nodeid.partition("[")[2].rstrip("]"), highlight=False)

    def say(self, what: str) -> None:
        """What happens next."""
        self._progress.update(self._task, now=what)


def run(options: argparse.Namespace) -> int:
    """Measure, write `result.json`, the report and the plots into a folder; 1 if anything of ours is wrong."""
    out: Path = options.out
    if options.threads:
        torch.set_num_threads(options.threads)
    out.mkdir(parents=True, exist_ok=True)
    raw, started = out / "pytest-benchmark.json", time.monotonic()
    raw.unlink(missing_ok=True)
    console = console_of_width()
    code, said = _pytest(console, options, raw)
    if not raw.exists() or not raw.stat().st_size:
        print(said, file=sys.stderr)
        return code or 1
    result = compact(json.loads(raw.read_text()))
    save(result, out / "result.json")
    if options.name:
        save(result, COMMITTED / f"{options.name}.json")
    written = write(result, out)
    if options.print:
        print(written[0].read_text())
    wrong = failures(result)
    if code and not wrong:
        print(said, file=sys.stderr)
    for line in wrong:
        console.print(f"WRONG: {line}", style="bold red", markup=False, highlight=False)
    console.print(headline(result), highlight=False)
    if warning := busy_warning(result["environment"]):
        console.print(warning, style="bold yellow")
    seconds = time.monotonic() - started
    console.print(
        f"{len(result['cases'])} cases in {seconds:.0f} s; the report is {written[0]}", highlight=False
    )
    return code


def _pytest(console: Console, options: argparse.Namespace, raw: Path) -> tuple[int, str]:
    """pytest's exit status, and what it said."""
    files = [
        str(HERE / f"bench_{operation}.py") for operation in ("kd", "l2sp", "blend")
    ]  # the order of the report
    arguments = [
        *files,
        "--benchmark-quiet",
        "--tag",
        options.tag,
        f"--benchmark-json={raw}",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=no",
    ]
    arguments += ["-k", options.k] if options.k else []
    arguments += [f"--seconds={options.seconds}"] if options.seconds is not None else []
    said = io.StringIO()
    with one_progress(console) as progress:
        display = Display(progress, options.tag)
        with contextlib.redirect_stdout(said):
            code = int(pytest.main(arguments, plugins=[display]))
        display.say("done")
    return code, said.getvalue()
