"""What the machine has that a build needs: sources, compiler, build tools, torch, nvcc.

Looked at in files and by running the compiler; torch is not imported, because that takes seconds.
"""

from __future__ import annotations

import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .nvcc import Nvcc, find_nvcc, host_of

OLDEST_TORCH = (2, 10)  # the stable ABI that csrc/ targets (TORCH_TARGET_VERSION)
CXX_STANDARD = "-std=c++20"

# Flags per SIMD level. Every file csrc/cpu/level*.cpp is compiled once for each of them.
LEVEL_FLAGS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
        "-Wno-maybe-uninitialized",  # GCC 12 warns a thousand times of its own intrinsics
    ),
}


@dataclass(frozen=True)
class Torch:
    """The torch that this interpreter would build against."""

    version: str
    cuda: str | None
    root: Path


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that was seen to work. `levels`: the SIMD levels it produces, not those this CPU has."""

    command: tuple[str, ...]
    version: str
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a build finds. A `*_problem` is None where all is well, else says what is missing."""

    sources_problem: str | None = None
    platform_problem: str | None = None
    compiler_problem: str | None = None
    tools_problem: str | None = None
    torch_problem: str | None = None
    compiler: Compiler | None = None
    torch: Torch | None = None
    nvcc_problem: str | None = None
    nvcc: Nvcc | None = None
    cuda_sources: tuple[str, ...] = ()


def look_around(environ: Mapping[str, str], root: Path, cuda: str = "auto") -> Facts:
    """All the facts for the source tree at `root`. Raises nothing: a lack is a fact as well.

    `cuda`: what FASTTRANSFER_CUDA asks for; nvcc is looked for, and tried, only where it would be used.
    """
    compiler, compiler_problem = find_compiler(environ)
    torch, torch_problem = find_torch()
    cuda_sources = tuple(sorted(str(path.relative_to(root)) for path in root.glob("csrc/cuda/*.cu")))
    nvcc, nvcc_problem = None, None
    if cuda_sources and compiler and torch and (cuda == "1" or (cuda == "auto" and torch.cuda)):
        nvcc, nvcc_problem = find_nvcc(environ, host_of(compiler.command))
    missing = [name for name in ("ninja", "pybind11") if find_spec(name) is None]
    linux = sys.platform == "linux"
    return Facts(
        sources_problem=None if (root / "csrc/module.cpp").is_file() else "csrc/module.cpp is not there",
        platform_problem=None if linux else f"they are built on Linux only (this is {sys.platform})",
        compiler_problem=compiler_problem,
        tools_problem=f"Python packages are missing: {', '.join(missing)}" if missing else None,
        torch_problem=torch_problem,
        compiler=compiler,
        torch=torch,
        nvcc_problem=nvcc_problem,
        nvcc=nvcc,
        cuda_sources=cuda_sources,
    )


def find_compiler(environ: Mapping[str, str]) -> tuple[Compiler | None, str | None]:
    """(compiler, problem), one of them None. CXX may hold several words (`ccache g++`)."""
    asked = shlex.split(environ.get("CXX", ""))
    candidates = [asked] if asked else [["g++"], ["c++"], ["clang++"]]
    found = [words for words in candidates if shutil.which(words[0], path=environ.get("PATH"))]
    if not found and asked:
        return None, f"the C++ compiler CXX={environ['CXX']} was not found"
    if not found:
        return None, "no C++ compiler was found (g++, c++ or clang++ on PATH; CXX names another)"
    command = tuple(found[0])
    # Python.h as well: a compiler without Python's headers is a common half-installed state.
    source = "#include <Python.h>\n#include <string>\nstd::string probe() { return PY_VERSION; }\n"
    error = try_compile(command, source, (f"-I{sysconfig.get_paths()['include']}",))
    if error:
        return None, f"the C++ compiler {shlex.join(command)} failed on a three-line program ({error})"
    return Compiler(command, compiler_version(command), find_levels(command)), None


def compiler_version(command: Sequence[str]) -> str:
    """The first line of what the compiler says of itself."""
    output = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return output.partition("\n")[0] or shlex.join(command)


def find_levels(command: Sequence[str]) -> tuple[str, ...]:
    """The SIMD levels to build. An old compiler may know fewer; other architectures have the baseline."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("baseline",)
    return tuple(
        level
        for level, flags in LEVEL_FLAGS.items()
        if not flags or try_compile(command, "int probe() { return 0; }\n", flags) is None
    )


def try_compile(command: Sequence[str], source: str, flags: Sequence[str]) -> str | None:
    """Compile and link `source` as a shared library: None where that works, else the first error."""
    with tempfile.TemporaryDirectory(prefix="fasttransfer-probe-") as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        line = [*command, CXX_STANDARD, "-fPIC", "-shared", *flags, str(path), "-o", f"{path}.so"]
        try:
            done = subprocess.run(line, capture_output=True, text=True)
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return None
    output = (done.stderr or done.stdout).strip().splitlines()
    errors = [text for text in output if "error" in text]
    return (errors or output or [f"exit status {done.returncode}"])[0]


def find_torch() -> tuple[Torch | None, str | None]:
    """(torch, problem). A torch that is too old or lacks its headers is returned with the problem."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None, "torch is not installed where the build runs"
    root = Path(next(iter(spec.submodule_search_locations)))
    try:
        values = runpy.run_path(str(root / "version.py"))
    except OSError as error:
        return None, f"the torch in {root} cannot be read ({error})"
    torch = Torch(str(values["__version__"]), values.get("cuda"), root)
    numbers = tuple(int(number) for number in re.findall(r"\d+", torch.version)[:2])
    if numbers < OLDEST_TORCH:
        return torch, f"torch {torch.version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        return torch, f"torch {torch.version} in {root} comes without its C++ headers"
    return torch, None
