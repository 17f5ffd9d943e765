"""The benchmarks: measure, report, compare.

python -m benchmarks run [--tag quick] [-o bench]     measure, then write result.json, report.md and the plots
python -m benchmarks report RESULT.json -o DIR        report.md and the plots of a result
python -m benchmarks compare A.json B.json            what moved from A to B
python -m benchmarks.readme [NAME | RESULT.json]      the speed table of the README
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.cases import TAGS
from benchmarks.results import ResultError, load


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if anything of ours computed a wrong answer, 2 for a file that is no result."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Three commands."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="run | report | compare")

    run = commands.add_parser("run", help="measure and report")
    run.add_argument(
        "--tag", default="quick", choices=list(TAGS), help="; ".join(f"{k}: {v}" for k, v in TAGS.items())
    )
    run.add_argument("-o", "--out", type=Path, default=Path("bench"), help="folder of the report")
    run.add_argument("-k", default="", help="only cases whose name has this (pytest's -k)")
    run.add_argument("--seconds", type=float, help="seconds of rounds per case (default: the tag's)")
    run.add_argument("--threads", type=int, help="threads of every provider (default: torch's own)")
    run.add_argument("--name", help="also keep the result as benchmarks/results/NAME.json")
    run.add_argument("--print", action="store_true", help="print report.md at the end: a CI job's summary")
    run.set_defaults(run=_run)

    report = commands.add_parser("report", help="the report of a result")
    report.add_argument("result", type=Path, help="a result, or a JSON of pytest-benchmark")
    report.add_argument("-o", "--out", type=Path, default=Path("bench"), help="folder of the report")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="what moved between two results")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(run=_compare)
    return top


def _run(options: argparse.Namespace) -> int:
    from benchmarks.run import run

    return run(options)


def _report(options: argparse.Namespace) -> int:
    from benchmarks.report import write

    for path in write(load(options.result), options.out):
        print(path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from benchmarks.compare import compare

    print(compare(load(options.before), load(options.after)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
