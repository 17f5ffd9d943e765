"""Compile `fasttransfer._C` with ninja: one shared library, flags per file, incremental through depfiles."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .decide import BuildError
from .probe import CXX_STANDARD, LEVEL_FLAGS, Compiler, Torch

MATH = ("-fno-math-errno", "-ffp-contract=fast")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
# The linker drops a plain -ltorch as unneeded, and the stream symbols are then missing at load.
TORCH_LIBRARIES = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


@dataclass(frozen=True)
class Unit:
    """One call of the compiler. Paths are relative to the source tree, where ninja runs."""

    source: str
    object: str
    flags: tuple[str, ...]


def object_dir(root: Path) -> Path:
    """Where the objects lie. (setuptools' build_temp is a new folder each time in an editable install.)"""
    return root / "build" / f"native-{sys.implementation.cache_tag}"


def library_name() -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def is_debug(environ: Mapping[str, str]) -> bool:
    return environ.get("FASTTRANSFER_DEBUG", "0") not in ("", "0")


def jobs(environ: Mapping[str, str]) -> list[str]:
    """ninja's arguments for MAX_JOBS; without it ninja uses every processor."""
    value = environ.get("MAX_JOBS", "").strip()
    if not value:
        return []
    if not value.isdigit() or int(value) == 0:
        raise BuildError(f"MAX_JOBS={value!r} is not understood. Accepted: a positive whole number.")
    return ["-j", value]


def units(root: Path, compiler: Compiler, torch: Torch, debug: bool) -> list[Unit]:
    """Every source with its flags: level*.cpp once per SIMD level, the rest once, at the baseline."""
    optimise = ("-O1", "-g") if debug else ("-O3",)
    common = (CXX_STANDARD, *optimise, "-fPIC", "-fvisibility=hidden", *MATH, "-Wall", "-Wextra", "-Icsrc")
    above_baseline = [f"-DFT_HAVE_{level.upper()}" for level in compiler.levels if level != "baseline"]
    with_torch = (*common, TORCH_TARGET, *torch_includes(torch), *above_baseline)
    objects = object_dir(root).relative_to(root)
    result = []
    for path in [root / "csrc/module.cpp", *sorted(root.glob("csrc/cpu/*.cpp"))]:
        source = str(path.relative_to(root))
        if not path.name.startswith("level"):
            result.append(Unit(source, f"{objects}/{path.stem}.o", with_torch))
            continue
        # No torch headers here: they bring inline functions, and of those the linker may keep the copy that
        # was compiled for AVX-512 for everybody (see weak_symbols.py).
        for level in compiler.levels:
            flags = (*common, f"-DFT_ISA={level}", *LEVEL_FLAGS[level])
            result.append(Unit(source, f"{objects}/{path.stem}.{level}.o", flags))
    return result


def torch_includes(torch: Torch) -> list[str]:
    """Include flags of torch, pybind11 and Python; as system headers, whose warnings are not ours."""
    import pybind11

    include = torch.root / "include"
    folders = [include, include / "torch/csrc/api/include", pybind11.get_include()]
    return [f"-isystem{folder}" for folder in (*folders, sysconfig.get_paths()["include"])]


def write_ninja(root: Path, compiler: Compiler, torch: Torch, debug: bool) -> Path:
    """Write build.ninja and return its path. ninja redoes what has a new source, header or command line."""
    from ninja import ninja_syntax

    folder = object_dir(root)
    folder.mkdir(parents=True, exist_ok=True)
    todo = units(root, compiler, torch, debug)
    library = str((folder / library_name()).relative_to(root))
    link = (*(() if debug else ("-s",)), f"-L{torch.root / 'lib'}", *TORCH_LIBRARIES)
    path = folder / "build.ninja"
    with path.open("w") as stream:
        ninja = ninja_syntax.Writer(stream, width=200)
        ninja.variable("builddir", str(folder.relative_to(root)))
        ninja.variable("cxx", quote(compiler.command))
        ninja.rule(
            "compile",
            "$cxx -MD -MF $out.d $flags -c $in -o $out",
            description="compile $out",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", "$cxx -shared $in -o $out $flags", description="link $out")
        for unit in todo:
            ninja.build(unit.object, "compile", unit.source, variables={"flags": quote(unit.flags)})
        ninja.build(library, "link", [unit.object for unit in todo], variables={"flags": quote(link)})
    return path


def quote(words: Iterable[str]) -> str:
    """Quoted for the shell, then for ninja, where `$` starts a variable."""
    return shlex.join(words).replace("$", "$$")


def build_library(root: Path, compiler: Compiler, torch: Torch, environ: Mapping[str, str]) -> Path:
    """Compile and link what is out of date; return the path of the shared library."""
    import ninja

    path = write_ninja(root, compiler, torch, is_debug(environ))
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(path.relative_to(root)), *jobs(environ)]
    # To stderr, where the decisions are: stdout belongs to the build front end.
    if subprocess.run(command, cwd=root, stdout=sys.stderr).returncode != 0:
        raise BuildError(
            "compiling the native CPU kernels failed (the compiler's messages are above). "
            "FASTTRANSFER_NATIVE=0 installs the pure-torch package without them."
        )
    return object_dir(root) / library_name()
