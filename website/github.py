"""Markdown that is written to be read in the repository, as the site needs it: links, lists, pipes in tables.

A link to a page of the site leads there. One to another file of the repository leads to the repository on the web,
if its address is known (`FASTTRANSFER_REPO_URL`, which the workflow sets); else its text stays, without a link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ITEM = re.compile(r"[-*] |1\. ")  # what begins a list inside a paragraph
FENCE = re.compile(r"^\s*(```|~~~)")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")

# Pages that are a file of the repository outside of docs/: where it is, and its address in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/NOTES.md": "kernel_notes.md",
}


def in_repository(page: str) -> str:
    """Where a page of the site is in the repository."""
    return {site: path for path, site in ELSEWHERE.items()}.get(page, f"docs/{page}")


def in_site(path: str) -> str | None:
    """The page of the site that a file of the repository is, if it is one."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else None


def rewrite(markdown: str, page: str, folder: str, repository: str) -> str:
    """The Markdown with its links as the site needs them.

    Args:
        markdown: As it stands in the repository.
        page: Its address in the site.
        folder: The folder of the repository that its links are relative to, "" for the root.
        repository: Address of the repository's files on the web, "" where it is not known.
    """

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if image or not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(folder, path))
        site = in_site(file)
        if site is not None:
            text = text.removeprefix("docs/").removesuffix(".md") if text == path else text
            return f"[{text}]({posixpath.relpath(site, posixpath.dirname(page) or '.')}{hash_}{anchor})"
        if not (ROOT / file).exists():
            return match[0]  # mkdocs will say that it leads nowhere
        return f"[{text}]({repository}/{file}{hash_}{anchor})" if repository else text

    lines, fenced, before = [], False, ""
    for line in markdown.split("\n"):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            if ITEM.match(line) and before and not before.startswith(" ") and not ITEM.match(before):
                lines.append("")  # for Python-Markdown a list does not begin inside a paragraph
            line = LINK.sub(link, pipes(line))
        lines.append(line)
        before = line
    return "\n".join(lines)


def pipes(line: str) -> str:
    r"""GitHub wants `\|` for a pipe in a table's code; Python-Markdown shows the backslash, and needs none there."""
    return (
        re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
    )
