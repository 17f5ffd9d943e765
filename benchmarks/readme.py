"""Writes the speed table of the README from a committed result.

Run it:  python -m benchmarks run --tag full --name NAME && python -m benchmarks.readme [benchmarks/results/NAME.json]

Everything between the two `speed` markers of README.md is replaced; nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.cases import COMPILED, NAIVE, OURS, select
from benchmarks.figures import duration, median, speedup, times
from benchmarks.results import load

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu-epyc-2core.json"


def table(result: dict[str, Any]) -> str:
    """The Markdown between the markers: the cases of the demo."""
    env = result["environment"]
    shown = {spec.key for spec in select("demo")}
    cases = [case for case in figures.plain(result["cases"]) if case["key"] in shown]
    lines = [
        f"{env['cpu']}, {env['threads']} threads, {env['simd']}, torch {env['torch']}; medians of interleaved rounds, "
        f"every result checked against float64 first. **GPU: {env['gpu']}.**",
        "",
        "| operation | naive | `torch.compile` of it | ours | against naive | against compile | of roofline |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    if warning := figures.busy_warning(env):
        lines[:0] = [f"**{warning}**", ""]
    for case in cases:
        cells = [cell(case, NAIVE), cell(case, COMPILED), f"**{cell(case, OURS)}**"]
        cells += [times(speedup(case, NAIVE)), times(speedup(case, COMPILED))]
        cells += [figures.percent(case["providers"][OURS].get("of_roofline"))]
        lines.append(f"| {case['title']} | {' | '.join(cells)} |")
        if other := figures.best_other(case):
            best = f"{cell(case, other)} | | | {times(speedup(case, other))} | |"
            lines.append(f"| &nbsp;&nbsp;against {code(other)} | {best} |")
    lines += ["", closing(result, cases)]
    return "\n".join(lines)


def closing(result: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """How to read the table and how to make it again."""
    lost, tied = figures.lost_and_tied(cases)
    where = f"Something else is faster in {len(lost)} of these comparisons and as fast in {len(tied)}. "
    return (
        "kd is forward and backward, float32 where nothing else is said; the naive code is "
        "[benchmarks/naive.py](benchmarks/naive.py); the roofline is what a plain torch call with the same reads and "
        f"writes reaches in the same rounds. {where if lost or tied else ''}Reproduce: `make bench`, then "
        f"`python -m benchmarks.readme bench/result.json` (commit {result['environment']['commit']})."
    )


def code(name: str) -> str:
    """A provider of torch as code, a peer as it is called."""
    return " ".join(f"`{word}`" if "_" in word else word for word in name.replace(",", " and").split())


def cell(case: dict[str, Any], name: str) -> str:
    """A provider's median, or a dash."""
    value = median(case, name)
    return duration(value) if value else "–"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    write_block("speed", table(load(options.result)))


def write_block(name: str, text: str) -> None:
    """Replace what is between the two markers of that name in README.md."""
    path = ROOT / "README.md"
    whole = path.read_text()
    first = whole.index("\n", whole.index(f"<!-- {name}:begin")) + 1
    last = whole.index(f"<!-- {name}:end -->")
    path.write_text(f"{whole[:first]}{text}\n{whole[last:]}")


if __name__ == "__main__":
    main()
