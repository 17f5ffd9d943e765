"""The demo: does knowledge transfer help here, and is it fast? Real data, one command.

Run it:  python -m examples.demo [--quick] [--out demo]

It prints its tables and writes a plot per part, `report.html` and `results.json` into the output directory. It exits
with 1 if a control misbehaves or if anything computes a wrong answer, never because of a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.rule import Rule

from benchmarks import speed
from benchmarks.display import console_of_width, one_progress
from benchmarks.machine import environment
from benchmarks.plots import plot_speed
from examples import s3_distillation, s6_fusion, s8_cross_domain
from examples.parts import Outcome, Part, Reporter, report
from examples.report import write_report
from examples.seeds import seeds

# The demo keeps to its time on a slow machine too: python -m benchmarks.speed takes all of its rounds.
SECONDS_PER_CASE = {"full": 1.5, "quick": 0.8}


def run_speed(quick: bool, reporter: Reporter) -> Outcome:
    """Part 4 is the speed table of the benchmarks, as it is."""
    seconds = SECONDS_PER_CASE["quick" if quick else "full"]
    results = speed.run(quick, lambda _: reporter.advance(), reporter.say, seconds)
    return Outcome(speed.headline(results), speed.renderables(results), results, speed.failures(results))


SPEED = Part("speed", "4  Speed against the naive code", speed.units, run_speed, speed.__doc__, plot_speed)
PARTS = [s3_distillation.PART, s8_cross_domain.PART, s6_fusion.PART, SPEED]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds and rounds, without torch.compile")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the report and results.json go")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = console_of_width()
    started = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with one_progress(console) as display:
        reporters = {part.key: Reporter(display, part.title, part.units(options.quick)) for part in PARTS}
        for part in PARTS:
            outcomes[part.key] = part.run(options.quick, reporters[part.key])
            reporters[part.key].say("done")

    failed, written = 0, {}
    for part in PARTS:
        console.print(Rule(part.title, align="left", style="dim"))
        failed += report(outcomes[part.key], console)
        if part.plot is not None:
            written[part.key] = part.plot(outcomes[part.key].results, options.out)
    results = results_of(options.quick, outcomes)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    page = write_report(options.out, PARTS, outcomes, written, results["environment"])
    console.print(Rule(style="dim"))
    seconds = time.monotonic() - started
    verdict = "[bold red]FAILED[/]" if failed else "[green]every control and verdict held[/]"
    console.print(f"{verdict} in {seconds:.0f} s; the report is {page}", highlight=False)
    return 1 if failed else 0


def results_of(quick: bool, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """All results, the seeds and the environment."""
    whole: dict[str, Any] = {"quick": quick, "seeds": list(seeds(quick)), "environment": environment()}
    whole |= {key: outcome.results for key, outcome in outcomes.items()}
    whole["failures"] = [line for outcome in outcomes.values() for line in outcome.failures]
    return whole


if __name__ == "__main__":
    sys.exit(main())
