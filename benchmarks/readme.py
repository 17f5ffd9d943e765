"""Writes the speed table of the README from a committed result.

Run it:  python -m benchmarks run --tag full --name NAME && python -m benchmarks.readme [NAME | RESULT.json]

Without a name it is the one measured last. The table says which machine it is of, and which others are committed.
Everything between the two `speed` markers of README.md is replaced; nothing there is typed by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.cases import COMPILED, NAIVE, OURS, select
from benchmarks.figures import cell, speedup, times
from benchmarks.results import COMMITTED, ResultError, committed, load

ROOT = Path(__file__).resolve().parent.parent


def chosen(asked: str | None) -> Path:
    """The result that is asked for, by its name in `benchmarks/results` or by its path; else the one measured last.

    Raises:
        ResultError: There is none.
    """
    known = {path.stem: path for path in committed()}
    if asked is not None:
        return known.get(asked, Path(asked))
    if not known:
        raise ResultError(f"{COMMITTED}: there is no result")
    return max(known.values(), key=lambda path: load(path)["environment"].get("date", ""))


def source(result: dict[str, Any], path: Path | None) -> str:
    """Which machine the table is of, when and of which commit; and which other machines have a committed result."""
    env = result["environment"]
    measured = f"measured {env['date'].partition(' ')[0]} at" if "date" in env else "measured at"
    kept = committed()
    where = f"[{path.stem}]({_link(path)}), " if path in kept else ""
    others = [other for other in kept if path in kept and other != path]
    also = ", ".join(f"[{other.stem}]({_link(other)})" for other in others)
    return f"{where}{measured} commit {env['commit']}." + (f" Other machines: {also}." if also else "")


def _link(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def table(result: dict[str, Any], path: Path | None = None) -> str:
    """The Markdown between the markers: the cases of the demo, of the result that `path` holds."""
    env = result["environment"]
    shown = {spec.key for spec in select("demo")}
    cases = [case for case in figures.plain(result["cases"]) if case["key"] in shown]
    lines = [
        f"{env['cpu']}, {env['threads']} threads, {env['simd']}, torch {env['torch']}: {source(result, path)} "
        f"Medians of interleaved rounds, every result checked against float64 first. **GPU: {env['gpu']}.**",
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
    lines += ["", closing(cases)]
    return "\n".join(lines)


def closing(cases: list[dict[str, Any]]) -> str:
    """How to read the table and how to make it again."""
    lost, tied = figures.lost_and_tied(cases)
    where = f"Something else is faster in {len(lost)} of these comparisons and as fast in {len(tied)}. "
    return (
        "kd is forward and backward, float32 where nothing else is said; the naive code is "
        "[benchmarks/naive.py](benchmarks/naive.py); the roofline is what a plain torch call with the same reads and "
        f"writes reaches in the same rounds. {where if lost or tied else ''}Reproduce: `make bench`, then "
        "`python -m benchmarks.readme bench/result.json`."
    )


def code(name: str) -> str:
    """A provider of torch as code, a peer as it is called."""
    return " ".join(f"`{word}`" if "_" in word else word for word in name.replace(",", " and").split())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "result", nargs="?", metavar="NAME | RESULT.json",
        help=f"{', '.join(path.stem for path in committed())}, or a file (default: the one measured last)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        path = chosen(options.result)
        text = table(load(path), path.resolve())
    except ResultError as error:
        parser.error(str(error))
    write_block("speed", text)
    print(f"README.md: the speed table is of {path}")


def write_block(name: str, text: str, page: str = "README.md") -> None:
    """Replace what is between the two markers of that name in a page."""
    path = ROOT / page
    whole = path.read_text()
    first = whole.index("\n", whole.index(f"<!-- {name}:begin")) + 1
    last = whole.index(f"<!-- {name}:end -->")
    path.write_text(f"{whole[:first]}{text}\n{whole[last:]}")


if __name__ == "__main__":
    main()
