"""The performance pages, made of the committed results at every build: nothing there is typed by hand.

`performance.md` has the table and the plots of the whole suite measured last, the other results' tables, checkpoints on
disk; `performance/NAME.md` is the whole report of each result.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import figures, readme, report, results

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = results.COMMITTED / "checkpoints"
INTRODUCTION = """# Performance

What is on this page comes from the results that are committed in the repository, each with its machine; the page is
made of them whenever the site is built. Times of different machines do not compare, ratios within one run do.

**On a GPU: not yet measured.** The CUDA kernels have not run on one.
"""


class Pages(NamedTuple):
    """What the site gets: Markdown, and files by their address."""

    texts: dict[str, str]
    images: dict[str, Path]


def is_page(address: str) -> bool:
    """Whether this module made that page; its links are relative to the root of the repository."""
    return address == "performance.md" or address.startswith("performance/")


def in_order() -> list[Path]:
    """The committed results: whole suites first, then by date, the last one first."""

    def rank(path: Path) -> tuple[bool, str]:
        result = results.load(path)
        return result["tag"] == "full", str(result["environment"].get("date", ""))

    return sorted(results.committed(), key=rank, reverse=True)


def pages(folder: Path) -> Pages:
    """The pages; the plots are written into `folder`, one folder in it per result."""
    texts: dict[str, str] = {}
    images: dict[str, Path] = {}
    parts = [INTRODUCTION]
    for number, path in enumerate(in_order()):
        result = results.load(path)
        drawn = report.write(result, folder / path.stem)[1:]
        images |= {f"performance/{path.stem}/{plot.name}": plot for plot in drawn}
        texts[f"performance/{path.stem}.md"] = whole_report(result, path, drawn)
        parts.append(summary(result, path, drawn if number == 0 else []))
    parts += [checkpoints(path) for path in sorted(CHECKPOINTS.glob("*.json"))]
    parts.append(OTHER_FIGURES)
    texts["performance.md"] = "\n".join(parts)
    return Pages(texts, images)


OTHER_FIGURES = """## What was tried

[The log of the kernels](benchmarks/NOTES.md) says what was tried on them, what it brought and what it did not. How the
suite measures, and how to run it: [benchmarks/README.md](benchmarks/README.md). Whether transfer *helps* is another
table, on the [start page](README.md#does-transfer-help).
"""


def summary(result: dict[str, Any], path: Path, drawn: list[Path]) -> str:
    """The README's table of a result, its plots, and where the rest is."""
    env = result["environment"]
    plots = "\n\n".join(image(plot, f"performance/{path.stem}/{plot.name}") for plot in drawn)
    kind = "" if result["tag"] == "full" else f", the {result['tag']} suite"
    return (
        f"## {env['cpu']}, {env['threads']} threads{kind}\n\n{figures.headline(result)}\n\n"
        f"{readme.table(result, path)}\n\n{plots}\n\n"
        f"[Everything that this run measured](docs/performance/{path.stem}.md).\n"
    )


def image(plot: Path, address: str) -> str:
    """A plot, which opens by itself at a click: on a phone it is small. The tables beside it have its figures."""
    return f"[![plot: {plot.stem.replace('_', ' ').replace('-', ' ')}]({address})]({address})"


def whole_report(result: dict[str, Any], path: Path, drawn: list[Path]) -> str:
    """`report.md` of a result, under its name."""
    text = report.markdown(result, drawn)
    for plot in drawn:
        text = text.replace(f"![{plot.stem}]({plot.name})", image(plot, f"{path.stem}/{plot.name}"))
    _, _, rest = text.partition("\n")
    return f"# {path.stem}\n{rest}"


def checkpoints(path: Path) -> str:
    """Blending files against `cat` and `cp`, of one machine."""
    found = json.loads(path.read_text())
    env = found["environment"]
    rows = [
        [
            dtype, figures.size(pair["bytes"]), figures.duration(pair["medians_s"]["floor"]),
            figures.duration(pair["medians_s"]["blend"]), figures.times(pair["blend_over_floor"]),
            figures.duration(pair["medians_s"]["command"]),
            figures.times(pair["command_over_floor"]), figures.size(pair["peak_anonymous_bytes"]),
            f"{pair['kills']['identical']} of {pair['kills']['tries']}",
        ]
        for dtype, pair in found["pairs"].items()
    ]  # fmt: skip
    headers = ["dtype", "of each file", "cat and cp", "blend", "times that", "the whole command", "times that",
               "memory", "killed, resumed, identical"]  # fmt: skip
    busy = max(pair["busy_processors"] for pair in found["pairs"].values())
    return (
        f"## Checkpoints on disk: {env['cpu']}, {env['threads']} threads\n\n"
        "Two safetensors files blended into a third. Against: `cat` of both and `cp` of one, in the same rounds, the "
        "output synchronised, the inputs in the page cache. The whole command also starts Python and imports torch. "
        f"torch {env['torch']}, commit {env['commit']}, measured {env['date']}; up to {busy:.1f} of {env['cores']} "
        f"processors were busy, these runs included.\n\n{report.table(headers, rows)}\n"
    )
