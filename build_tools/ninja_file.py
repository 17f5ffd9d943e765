"""A shared library as a ninja file: flags per source, incremental through depfiles, redone when a flag changes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .decide import BuildError


@dataclass(frozen=True)
class Unit:
    """One call of the compiler. Paths are relative to the source tree, where ninja runs."""

    source: str
    object: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """Everything that is needed to make one shared library."""

    folder: Path  # of build.ninja, the objects and the library
    name: str
    compile: str  # ninja command with $in, $out and $flags, that writes the dependencies to $out.d
    link: str  # ninja command with $in, $out and $flags
    link_flags: tuple[str, ...]
    units: list[Unit]


def quote(words: Iterable[str]) -> str:
    """Quoted for the shell, then for ninja, where `$` starts a variable."""
    return shlex.join(words).replace("$", "$$")


def jobs(environ: Mapping[str, str]) -> list[str]:
    """ninja's arguments for MAX_JOBS; without it ninja uses every processor."""
    value = environ.get("MAX_JOBS", "").strip()
    if not value:
        return []
    if not value.isdigit() or int(value) == 0:
        raise BuildError(f"MAX_JOBS={value!r} is not understood. Accepted: a positive whole number.")
    return ["-j", value]


def write(root: Path, library: Library) -> Path:
    """Write build.ninja and return its path. ninja redoes what has a new source, header or command line."""
    from ninja import ninja_syntax

    library.folder.mkdir(parents=True, exist_ok=True)
    path = library.folder / "build.ninja"
    with path.open("w") as stream:
        ninja = ninja_syntax.Writer(stream, width=200)
        ninja.variable("builddir", str(library.folder.relative_to(root)))
        ninja.rule("compile", library.compile, description="compile $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", library.link, description="link $out")
        for unit in library.units:
            ninja.build(unit.object, "compile", unit.source, variables={"flags": quote(unit.flags)})
        target = str((library.folder / library.name).relative_to(root))
        objects = [unit.object for unit in library.units]
        ninja.build(target, "link", objects, variables={"flags": quote(library.link_flags)})
    return path


def make(root: Path, library: Library, environ: Mapping[str, str]) -> Path | None:
    """Compile and link what is out of date; the path of the library, or None where the compiler failed."""
    import ninja

    path = write(root, library)
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(path.relative_to(root)), *jobs(environ)]
    # To stderr, where the decisions are: stdout belongs to the build front end.
    done = subprocess.run(command, cwd=root, stdout=sys.stderr)
    return library.folder / library.name if done.returncode == 0 else None


def install(library: Path, target: Path) -> None:
    """Copy it there in one step: a process that has the old one mapped keeps it, where overwriting would kill it."""
    new = target.with_name(target.name + ".new")
    shutil.copyfile(library, new)
    new.replace(target)
