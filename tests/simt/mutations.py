"""Every barrier, mask and bound of the kernels, changed one at a time: what a mutant is and where they are.

All mutants of a file are in one copy of it, where each changed place asks mutant.h whether it is the one that runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# device.cuh and launch.cuh are the machine, which the harness replaces.
NOT_KERNELS = {"device.cuh", "launch.cuh"}
_BARRIER = re.compile(r"(?:device::)?(cluster_barrier|warp_barrier|barrier)\([^()]*\);")
_MASKED = re.compile(r"\b(shuffle_xor|shuffle|ballot|warp_barrier)(?:<[^<>()]*>)?\((?=[^)])")
_CLAMP = re.compile(r"\b(?:std::)?(f?min|f?max|fminf|fmaxf)(?:<[^<>()]*>)?\(")
_COMPARISON = re.compile(r" (<=|>=|<|>) ")
_BOUND = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
# A minimum or maximum: at equality nothing changes.
_CHOICE = re.compile(r"([\w.:]+) (<|>) ([\w.:]+) \? (?:\1 : \3|\3 : \1)")
_BY_ONE = re.compile(r" [+-] (1)\b(?![.\w])")
_OPERATORS = {"<": "Less", "<=": "LessEqual", ">": "Greater", ">=": "GreaterEqual"}
_HEADER = '#pragma once\n#include "simt/mutant.h"\n'

Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Edit:
    """Characters [start, end) of a line, and what takes their place; {id}: the mutant's number."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Mutant:
    """One line of a source, changed at one place."""

    file: str
    line: int  # from 0
    before: str
    after: str
    kind: str
    number: int  # which of the file's mutants that read alike
    edits: tuple[Edit, ...]  # that let it be chosen

    @property
    def key(self) -> Key:
        """What it is recognised by when lines move."""
        return self.file, self.before.strip(), self.after.strip(), self.number


def code_of(line: str) -> str:
    """The line without its comment."""
    return line.partition("//")[0]


def _ask(name: str) -> str:
    return f"::ft::mutant::{name}"


def _changes(line: str) -> Iterator[tuple[str, Edit, tuple[Edit, ...]]]:
    """(kind, what changes in the source, what lets it be chosen) within a line."""
    for found in _BARRIER.finditer(line):
        start, end = found.span()
        yield found[1], Edit(start, end, ";"), (Edit(start, start, f"if (!{_ask('on')}({{id}})) "),)
    for found in _MASKED.finditer(line):
        start, end = found.end(), _argument_end(line, found.end())
        asks = Edit(start, start, f"{_ask('mask')}({{id}}, "), Edit(end, end, ")")
        yield "mask", Edit(start, end, f"({line[start:end]}) >> 1"), asks
    for found in _CLAMP.finditer(line):
        other = found[1].translate(
            str.maketrans("in", "ax") if "min" in found[1] else str.maketrans("ax", "in")
        )
        ask = _ask("least" if "min" in found[1] else "greatest")
        yield "clamp", Edit(*found.span(1), other), (Edit(*found.span(), f"{ask}({{id}}, "),)
    choices = {found.start(2) for found in _CHOICE.finditer(line)}
    for found in _COMPARISON.finditer(line):
        start, end = found.span(1)
        kind, changed = ("clamp", _TURNED) if start in choices else ("bound", _BOUND)
        other = changed[found[1]]
        op = _ask("Op")
        names = f"{op}::k{_OPERATORS[found[1]]}, {op}::k{_OPERATORS[other]}"
        yield kind, Edit(start, end, other), (Edit(start, end, f"< {_ask('Compare')}<{{id}}, {names}>() >"),)
    for found in _BY_ONE.finditer(line):
        yield "by one", Edit(*found.span(1), "0"), (Edit(*found.span(1), f"{_ask('one')}({{id}})"),)


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


def _edited(line: str, edits: list[Edit]) -> str:
    # Of edits at one place the later one is the inner one.
    for edit in sorted(edits, key=lambda e: e.start, reverse=True):
        line = line[: edit.start] + edit.text + line[edit.end :]
    return line


def mutants_of(path: Path) -> list[Mutant]:
    """In the order of the source."""
    found: list[Mutant] = []
    for number, line in enumerate(path.read_text().splitlines()):
        code = code_of(line)
        if code.lstrip().startswith(("#", "static_assert", "template")):
            continue
        for kind, change, edits in _changes(code):
            changed = _edited(line, [change])
            texts = line.strip(), changed.strip()
            alike = sum((other.before.strip(), other.after.strip()) == texts for other in found)
            found.append(Mutant(path.name, number, line, changed, kind, alike, edits))
    return found


def choosable(text: str, mutants: dict[int, Mutant]) -> str:
    """The source with all of these, by their numbers, to be chosen from when it runs."""
    edits: dict[int, list[Edit]] = {}
    for number, mutant in mutants.items():
        for edit in mutant.edits:
            numbered = Edit(edit.start, edit.end, edit.text.replace("{id}", str(number)))
            edits.setdefault(mutant.line, []).append(numbered)
    lines = [_edited(line, edits.get(i, [])) for i, line in enumerate(text.splitlines())]
    return "\n".join(lines).replace("#pragma once\n", _HEADER, 1) + "\n"
