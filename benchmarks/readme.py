"""Writes the speed table of the README from a committed result.

Run it:  python -m benchmarks.readme [benchmarks/results/NAME.json]

Everything between the two `speed` markers of README.md is replaced; nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.cases import COMPILED, FOREACH, NAIVE, OURS
from benchmarks.speed import duration, speedup

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cpu-epyc-2core.json"


def table(results: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    env = results["environment"]
    lines = [
        f"{env['cpu']}, {env['threads']} threads, {env['simd']}, torch {env['torch']}, float32; medians of "
        "interleaved rounds, every result checked against float64 first. **GPU: not yet measured.**",
        "",
        "| operation | naive | `torch.compile` of it | ours | against naive | against compile |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in results["cases"]:
        cells = [cell(case, NAIVE), cell(case, COMPILED), f"**{cell(case, OURS)}**"]
        cells += [ratio(speedup(case, NAIVE)), ratio(speedup(case, COMPILED))]
        lines.append(f"| {case['title']} | {' | '.join(cells)} |")
        if FOREACH in case["providers"]:
            best = f"{cell(case, FOREACH)} | | | {ratio(speedup(case, FOREACH))} |"
            lines.append(f"| &nbsp;&nbsp;against `torch.{FOREACH}` | {best} |")
    lines += [
        "",
        "kd is forward and backward; the naive code is [benchmarks/naive.py](benchmarks/naive.py). Rows below 1x are "
        "where something else is faster: for a plain in-place average of one source `torch._foreach_lerp_` already "
        "is at the memory's limit, and a handful of small tensors does not pay for the argument checks. Reproduce: "
        f"`python -m benchmarks.speed --json {RESULT.relative_to(ROOT)} && python -m benchmarks.readme` (commit "
        f"{env['commit']}).",
    ]
    return "\n".join(lines)


def cell(case: dict[str, Any], name: str) -> str:
    """A provider's median, or a dash."""
    median = case["providers"].get(name, {}).get("median_s")
    return duration(median) if median else "–"


def ratio(value: float | None) -> str:
    """How many times faster ours is."""
    return f"{value:.3g}x" if value else "–"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    write_block("speed", table(json.loads(options.result.read_text())))


def write_block(name: str, text: str) -> None:
    """Replace what is between the two markers of that name in README.md."""
    path = ROOT / "README.md"
    whole = path.read_text()
    first = whole.index("\n", whole.index(f"<!-- {name}:begin")) + 1
    last = whole.index(f"<!-- {name}:end -->")
    path.write_text(f"{whole[:first]}{text}\n{whole[last:]}")


if __name__ == "__main__":
    main()
