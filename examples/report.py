"""The demo's page: what came out, the plots, the tables and the environment, in one HTML file without links."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from examples.parts import Outcome, Part

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .3rem } h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem }
p { max-width: 48rem } .lead { font-weight: 600 } .dim { color: #7b8794 } .failed { color: #c92a2a; font-weight: 600 }
img { max-width: 100%; margin: .6rem 0 }
table { border-collapse: collapse; margin: 1rem 0; font-size: .88rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left } th { color: #52606d; font-weight: 500 }
.green { color: #2b8a3e } .red { color: #c92a2a } .yellow { color: #b35c00 } .bold { font-weight: 600 }
pre { font-size: .8rem; white-space: pre-wrap; color: #52606d }
"""


def write_report(
    directory: Path,
    parts: Sequence[Part],
    outcomes: Mapping[str, Outcome],
    plots: Mapping[str, Path],
    environment: Mapping[str, Any],
) -> Path:
    """Write `report.html` and return its path. The images are inside it."""
    body = ["<h1>Does knowledge transfer help here, and is it fast?</h1>", facts(environment)]
    body.append("".join(f"<p>{escape(outcomes[part.key].headline)}</p>" for part in parts))
    for part in parts:
        outcome = outcomes[part.key]
        body.append(f"<h2>{escape(part.title)}</h2><p class=lead>{escape(outcome.headline)}</p>")
        body += [f"<p>{escape(text)}</p>" for text in paragraphs(part.about)]
        body += [f"<p class=failed>FAILED: {escape(line)}</p>" for line in outcome.failures]
        if part.key in plots:
            image = base64.b64encode(plots[part.key].read_bytes()).decode()
            body.append(f'<img src="data:image/png;base64,{image}" alt="{escape(part.title)}">')
        body += [as_html(item) for item in outcome.tables]
    page = directory / "report.html"
    head = f"<!doctype html><meta charset=utf-8><title>fasttransfer: the demo</title><style>{STYLE}</style>"
    page.write_text(head + "\n".join(body) + "\n")
    return page


def facts(environment: Mapping[str, Any]) -> str:
    """The machine and the versions in a line."""
    line = (
        f"{environment['cpu']}, {environment['cores']} cores, SIMD {environment['simd']}, torch "
        f"{environment['torch']}, commit {environment['commit']}; GPU: {environment['gpu']}"
    )
    return f"<p class=dim>{escape(line)}</p>"


def paragraphs(about: str) -> list[str]:
    """A module's docstring without its first line and the line on how to run it."""
    blocks = [" ".join(block.split()) for block in about.strip().split("\n\n")[1:]]
    return [block for block in blocks if not block.startswith("Run it:")]


def as_html(item: RenderableType) -> str:
    """A rich table or text as HTML, in the colours that the terminal shows."""
    if isinstance(item, Table):
        head = "".join(f"<th>{in_colour(column.header)}</th>" for column in item.columns)
        rows = zip(*(column.cells for column in item.columns), strict=True)
        body = "".join(
            "<tr>" + "".join(f"<td>{in_colour(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        title = f"<caption>{in_colour(item.title)}</caption>" if item.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    text = item.plain if isinstance(item, Text) else str(item)
    return f"<pre>{escape(text)}</pre>" if text.strip() else ""


def in_colour(cell: Any) -> str:
    """A cell with its markup as spans whose classes are the words of its style."""
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    if isinstance(cell, Text) and cell.style:
        return f'<span class="{escape(str(cell.style))}">{escape(text.plain)}</span>'
    html, at = "", 0
    for span in sorted(text.spans, key=lambda s: (s.start, -s.end)):
        if span.start >= at:  # of nested spans the outer one
            html += escape(text.plain[at : span.start])
            html += (
                f'<span class="{escape(str(span.style))}">{escape(text.plain[span.start : span.end])}</span>'
            )
            at = span.end
    return html + escape(text.plain[at:])
