"""That a release is what its tag says: `python -m build_tools.release v0.1.0`, before anything of it is built.

The version is written once, in pyproject.toml, and a tag is checked against it. So every tree builds with the right
version: a clone without tags, a shallow one, an sdist. A version taken from git needs tags or an exception in each.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version_of(pyproject: str) -> str:
    """The version in the text of pyproject.toml. (tomllib is not in Python 3.10.)"""
    found = re.search(r'^version = "([^"]+)"$', pyproject, re.MULTILINE)
    if found is None:
        raise ValueError('pyproject.toml has no line `version = "..."`')
    return found[1]


def problems(tag: str, pyproject: str, changelog: str) -> list[str]:
    """What is wrong with releasing this tree under that tag."""
    version = version_of(pyproject)
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and pyproject.toml has {version}: v{version} is expected")
    headings = re.findall(r"^## \[([^\]]+)\](.*)$", changelog, re.MULTILINE)
    released = [(name, rest) for name, rest in headings if name != "Unreleased"]
    if not released or released[0][0] != version:
        newest = released[0][0] if released else "none"
        found.append(f"the newest release in CHANGELOG.md is {newest}: [{version}] is expected")
    elif not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", released[0][1]):
        found.append(f"[{version}] in CHANGELOG.md has no date: `## [{version}] - YYYY-MM-DD` is expected")
    return found


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) != 1:
        print("usage: python -m build_tools.release TAG", file=sys.stderr)
        return 2
    texts = ((ROOT / name).read_text() for name in ("pyproject.toml", "CHANGELOG.md"))
    found = problems(arguments[0], *texts)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
