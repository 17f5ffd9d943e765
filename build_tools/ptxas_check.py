"""Compile every CUDA kernel and look at what ptxas made of it: `python -m build_tools.ptxas_check`, `make cuda-check`.

Needs nvcc and no GPU. A kernel that spills registers, or keeps anything in local memory, fails the check: that memory
is DRAM traffic that no header comment counts. Printed are the registers of every kernel, per architecture. The library
is linked as well, into build/cuda-check, where cuda_symbols finds it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import architectures as arch
from . import compile_cuda
from .decide import BuildError
from .ninja_file import make
from .probe import Facts, look_around

# Those of the design, and the oldest that is built by default.
ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"


@dataclass(frozen=True)
class Function:
    """What ptxas says of one function for one architecture. Bytes per thread, except `shared`: of a block."""

    name: str  # mangled
    architecture: str
    kernel: bool
    frame: int = 0
    spilled: int = 0
    registers: int = 0
    shared: int = 0

    @property
    def bad(self) -> bool:
        return self.frame > 0 or self.spilled > 0


def check_dir(root: Path) -> Path:
    return root / "build" / "cuda-check"


def parse(log: str) -> list[Function]:
    """The functions in the output of `ptxas -v` of one source, in order."""
    found: list[Function] = []
    architecture, name, kernels = "", "", set()
    values: dict[str, int] = {}

    def finish() -> None:
        if name and values:
            found.append(Function(name, architecture, name in kernels, **values))
        values.clear()

    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            finish()
            name, architecture = match[1], arch.capability(match[2])
            kernels.add(name)
        elif match := re.search(r"Function properties for (\S+)", line):
            if match[1] != name:  # a device function that was not inlined, behind the kernel that calls it
                finish()
                name = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            frame, stores, loads = map(int, match.groups())
            values |= {"frame": frame, "spilled": stores + loads}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            local = re.search(r"(\d+) bytes lmem", line)
            values |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
            values["frame"] = max(values.get("frame", 0), int(local[1]) if local else 0)
    finish()
    return found


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Readable names by mangled ones; the mangled ones themselves where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return dict(zip(names, names, strict=True))
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, done.stdout.splitlines()), strict=True))


def short(name: str) -> str:
    """`kd_row<BFloat16, 4>` of `void ft::(anonymous namespace)::kd_row<ft::BFloat16, 4>(ft::Params)`."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(ft|device|core)::", "", name)
    name = re.sub(r"\((?:int|bool|long|unsigned int|\w+::\w+|\w+)\)(-?\d+)", r"\1", name)  # (bool)1
    depth = 0
    for i, letter in enumerate(name):  # the parameter list opens outside of <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def table(functions: Iterable[Function]) -> str:
    """A row per kernel, a column of registers per architecture; `!` where something is wrong."""
    functions = [f for f in functions if f.kernel or f.bad]
    names = demangle(sorted({f.name for f in functions}))
    columns = sorted({f.architecture for f in functions}, key=lambda a: float(a.rstrip("af")))
    cells: dict[str, dict[str, Function]] = {}
    for function in functions:
        cells.setdefault(names[function.name], {})[function.architecture] = function
    width = max([len(name) for name in cells] + [6])
    lines = [
        f"{'kernel':{width}}  " + "  ".join(f"{'sm_' + c.replace('.', ''):>7}" for c in columns) + "   shared"
    ]
    for name, row in sorted(cells.items()):
        values = [f"{row[c].registers}{'!' * row[c].bad}" if c in row else "-" for c in columns]
        shared = max(f.shared for f in row.values())
        lines.append(f"{name:{width}}  " + "  ".join(f"{v:>7}" for v in values) + f"  {shared:>7}")
    return "\n".join(lines)


def complaints(functions: Iterable[Function]) -> list[str]:
    bad = [f for f in functions if f.bad]
    names = demangle(sorted({f.name for f in bad}))
    return [
        f"{names[f.name]} for {f.architecture}: {f.frame} bytes of local memory, {f.spilled} bytes spilled"
        for f in bad
    ]


def compile_all(root: Path, asked: str | None, facts: Facts) -> list[Function]:
    """Compile and link for these architectures, and read what ptxas said. Raises BuildError."""
    if facts.nvcc is None or facts.torch is None:
        raise BuildError(f"cannot compile the CUDA kernels: {facts.nvcc_problem or facts.torch_problem}")
    chosen = arch.choose(asked, facts.nvcc.supported)
    todo = compile_cuda.library(root, check_dir(root), facts.nvcc, facts.torch, chosen)
    if make(root, todo, os.environ) is None:
        raise BuildError("the CUDA kernels do not compile (nvcc's messages are above)")
    functions = []
    for unit in todo.units:
        functions += parse(Path(root, f"{unit.object}.log").read_text())
    expected = {name.removesuffix("+PTX") for name in chosen}
    if seen := expected - {f.architecture for f in functions}:
        raise BuildError(f"ptxas said nothing for {', '.join(sorted(seen))}")
    return functions


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m build_tools.ptxas_check", description=__doc__)
    parser.add_argument("--arch", default=ARCHITECTURES, help="as TORCH_CUDA_ARCH_LIST; default: %(default)s")
    options = parser.parse_args(arguments)
    root = Path.cwd()
    facts = look_around(os.environ, root, cuda="1")
    if not facts.cuda_sources:
        print("ptxas_check: there are no CUDA sources (csrc/cuda/*.cu)")
        return 0
    try:
        functions = compile_all(root, options.arch, facts)
    except (BuildError, arch.ArchitectureError) as error:
        print(f"ptxas_check: {error}", file=sys.stderr)
        return 2
    print(f"registers per thread; {facts.nvcc.path if facts.nvcc else ''}")
    print(table(functions))
    wrong = complaints(functions)
    for line in wrong:
        print(f"ptxas_check: {line}", file=sys.stderr)
    kernels = sum(f.kernel for f in functions)
    if not wrong:
        print(
            f"ptxas_check: {kernels} kernels of {len(facts.cuda_sources)} files, no spills, no local memory"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
