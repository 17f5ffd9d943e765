"""Docstrings as Markdown: what is written in the fashion of Sphinx is rewritten when the site is built.

`text::` before an indented block loses a colon, a table drawn with rows of `=` becomes one of Markdown, and what is
returned becomes a paragraph.
"""

from __future__ import annotations

import re
import textwrap

# Prose here, which Griffe would take up to its first colon for a type.
RETURNS = re.compile(r"^Returns:\n((?: {4}.*(?:\n|$)|\n)+)", re.MULTILINE)
RULE = re.compile(r"^=+( +=+)+$")


def as_markdown(text: str) -> str:
    """A docstring's text."""
    text = re.sub(
        r"^Example:$", "Examples:", tables(text), flags=re.MULTILINE
    )  # the heading that Griffe knows
    text = RETURNS.sub(lambda found: "**Returns:**\n\n" + textwrap.dedent(found[1]), text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def tables(text: str) -> str:
    """Tables in Markdown: a rule, the header, a rule, rows, a rule."""
    lines, drawn, rules = [], [], 0
    for line in text.split("\n"):
        if RULE.match(line):
            rules += 1
        if not rules:
            lines.append(line)
            continue
        drawn.append(line)
        if rules == 3:
            lines += markdown_table(drawn)
            drawn, rules = [], 0
    return "\n".join(lines + drawn)


def markdown_table(drawn: list[str]) -> list[str]:
    """The lines of a drawn table; a line whose first cell is empty goes on with the row above."""
    starts = [match.start() for match in re.finditer("=+", drawn[0])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    for line in (line for line in drawn if not RULE.match(line)):
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    rows.insert(1, ["---"] * len(starts))
    return ["| " + " | ".join(row) + " |" for row in rows]
