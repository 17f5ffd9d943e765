"""Every barrier, mask and bound of the kernels, changed one at a time: what a mutant is and where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# device.cuh and launch.cuh are the machine, which the harness replaces.
NOT_KERNELS = {"device.cuh", "launch.cuh"}
_BARRIER = re.compile(r"(?:device::)?(cluster_barrier|warp_barrier|barrier)\([^()]*\);")
_MASKED = re.compile(r"\b(shuffle_xor|shuffle|ballot|warp_barrier)(?:<[^<>()]*>)?\((?=[^)])")
_CLAMP = re.compile(r"\b(?:std::)?(min|max|fminf|fmaxf)(?:<[^<>()]*>)?\(")
_OTHER_CLAMP = {"min": "max", "max": "min", "fminf": "fmaxf", "fmaxf": "fminf"}
_COMPARISON = re.compile(r" (<=|>=|<|>) ")
_OTHER_COMPARISON = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_CHOICE = re.compile(
    r"([\w.:]+) (<|>) ([\w.:]+) \? (?:\1 : \3|\3 : \1)"
)  # a minimum: at equality nothing changes
_BY_ONE = re.compile(r" ([+-]) 1\b(?![.\w])")


@dataclass(frozen=True)
class Mutant:
    """One line of a source, changed at one place."""

    file: str
    line: int  # from 0
    before: str
    after: str
    kind: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is recognised by when lines move."""
        return self.file, self.before.strip(), self.after.strip()


def code_of(line: str) -> str:
    """The line without its comment."""
    return line.partition("//")[0]


def _changes(line: str) -> Iterator[tuple[int, int, str, str]]:
    """(from, to, in its place, kind) within a line."""
    for found in _BARRIER.finditer(line):
        yield found.start(), found.end(), ";", found[1]
    for found in _MASKED.finditer(line):
        end = _argument_end(line, found.end())
        mask = line[found.end() : end]
        yield found.end(), end, f"({mask}) >> 1", "mask"
    for found in _CLAMP.finditer(line):
        yield found.start(1), found.end(1), _OTHER_CLAMP[found[1]], "clamp"
    choices = {found.start(2): found for found in _CHOICE.finditer(line)}
    for found in _COMPARISON.finditer(line):
        if found.start(1) in choices:
            yield found.start(1), found.end(1), _TURNED[found[1]], "clamp"
        else:
            yield found.start(1), found.end(1), _OTHER_COMPARISON[found[1]], "bound"
    for found in _BY_ONE.finditer(line):
        yield found.start(), found.end(), f" {found[1]} 0", "by one"


def _argument_end(line: str, start: int) -> int:
    depth = 0
    for i in range(start, len(line)):
        if line[i] in "([{":
            depth += 1
        elif line[i] in ")]}":
            if depth == 0:
                return i
            depth -= 1
        elif line[i] == "," and depth == 0:
            return i
    return len(line)


def mutants_of(path: Path) -> list[Mutant]:
    """In the order of the source."""
    found = []
    for number, line in enumerate(path.read_text().splitlines()):
        code = code_of(line)
        if code.lstrip().startswith(("#", "static_assert", "template")):
            continue
        for start, end, replacement, kind in _changes(code):
            changed = line[:start] + replacement + line[end:]
            found.append(Mutant(path.name, number, line, changed, kind))
    return found


def apply(mutant: Mutant, text: str) -> str:
    """The source with this one change."""
    lines = text.splitlines()
    assert lines[mutant.line] == mutant.before, "the source has changed"
    lines[mutant.line] = mutant.after
    return "\n".join(lines) + "\n"
