"""Compile the CPU kernels, `fasttransfer._C`: level*.cpp once per SIMD level, the rest once."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from .decide import BuildError
from .ninja_file import Library, Unit, make, quote
from .probe import CXX_STANDARD, LEVEL_FLAGS, Compiler, Torch

MATH = ("-fno-math-errno", "-ffp-contract=fast")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
# The linker drops a plain -ltorch as unneeded, and the stream symbols are then missing at load.
TORCH_LIBRARIES = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


def object_dir(root: Path) -> Path:
    """Where the objects lie. (setuptools' build_temp is a new folder each time in an editable install.)"""
    return root / "build" / f"native-{sys.implementation.cache_tag}"


def library_name() -> str:
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def is_debug(environ: Mapping[str, str]) -> bool:
    return environ.get("FASTTRANSFER_DEBUG", "0") not in ("", "0")


def units(root: Path, compiler: Compiler, torch: Torch, debug: bool) -> list[Unit]:
    """Every source with its flags: level*.cpp once per SIMD level, the rest once, at the baseline."""
    optimise = ("-O1", "-g") if debug else ("-O3",)
    common = (CXX_STANDARD, *optimise, "-fPIC", "-fvisibility=hidden", *MATH, "-Wall", "-Wextra", "-Icsrc")
    above_baseline = [f"-DFT_HAVE_{level.upper()}" for level in compiler.levels if level != "baseline"]
    with_torch = (*common, TORCH_TARGET, *torch_includes(torch), *python_includes(), *above_baseline)
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
    """Include flags of torch; as system headers, whose warnings are not ours."""
    include = torch.root / "include"
    return ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]


def python_includes() -> list[str]:
    """Include flags of pybind11 and Python."""
    import pybind11

    return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]]


def build_library(root: Path, compiler: Compiler, torch: Torch, environ: Mapping[str, str]) -> Path:
    """Compile and link what is out of date; return the path of the shared library."""
    debug = is_debug(environ)
    command = quote(compiler.command)
    library = Library(
        folder=object_dir(root),
        name=library_name(),
        compile=f"{command} -MD -MF $out.d $flags -c $in -o $out",
        link=f"{command} -shared $in -o $out $flags",
        link_flags=(*(() if debug else ("-s",)), f"-L{torch.root / 'lib'}", *TORCH_LIBRARIES),
        units=units(root, compiler, torch, debug),
    )
    path = make(root, library, environ)
    if path is None:
        raise BuildError(
            "compiling the native CPU kernels failed (the compiler's messages are above). "
            "FASTTRANSFER_NATIVE=0 installs the pure-torch package without them."
        )
    return path
