"""Compile the kernels of csrc/cuda for the CPU: the library of the backend `simt`, and standalone programs.

python -m tests.simt.build            # the library, into build/simt
python -m tests.simt.build asan kd    # a program and its sanitizer: plain, asan or tsan; selftest, kd, ...
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from build_tools import probe
from build_tools.compile import TORCH_LIBRARIES, TORCH_TARGET, torch_includes
from build_tools.ninja_file import Library, Unit, make, quote

ROOT = Path(__file__).resolve().parent.parent.parent
MACHINE = tuple(f"tests/simt/{name}.cpp" for name in ("machine", "meetings", "memory", "settings", "fiber"))
FLAGS = (probe.CXX_STANDARD, "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DFT_SIMT", "-Icsrc", "-Itests")


@dataclass(frozen=True)
class Sanitizer:
    """Flags of a build. `kernels`: for what is under test; the machine itself is compiled without them."""

    both: tuple[str, ...]
    kernels: tuple[str, ...]


ASAN = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
SANITIZERS = {
    "plain": Sanitizer(("-O1", "-g", "-DFT_SIMT_COUNT"), ()),
    "asan": Sanitizer(("-O1", "-g", "-DFT_SIMT_ASAN", *ASAN), ()),
    # GCC's TSan does not follow a struct passed by value to a call: functions of kernels are always inlined.
    "tsan": Sanitizer(("-O1", "-g", "-DFT_SIMT_TSAN"), ("-fsanitize=thread",)),
}


class BuildFailed(RuntimeError):
    """The compiler's messages are in it."""


@cache
def find_compiler() -> tuple[probe.Compiler | None, str | None]:
    """(compiler, problem), one of them None. It takes seconds: the compiler is tried."""
    return probe.find_compiler(os.environ)


def why_not() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if not sources():
        return "there is no csrc/cuda/*.cu"
    return find_compiler()[1]


def sources(root: Path = ROOT) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob("csrc/cuda/*.cu"))


def contraction() -> tuple[str, ...]:
    """Multiply-adds are fused, as nvcc does, where this CPU has them."""
    with contextlib.suppress(OSError):
        if " fma " in Path("/proc/cpuinfo").read_text():
            return ("-ffp-contract=fast", "-mfma", "-mavx2")
    return ("-ffp-contract=fast",)


def _make(root: Path, library: Library) -> Path:
    """ninja's output is shown only where it fails."""
    # make() lets ninja write to stderr: a file in its place, so that the message can be in the exception.
    with tempfile.TemporaryFile("w+") as log:
        saved, saved_stderr = os.dup(2), sys.stderr
        os.dup2(log.fileno(), 2)
        sys.stderr = log
        try:
            path = make(root, library, {"MAX_JOBS": "2", **os.environ})
        finally:
            sys.stderr = saved_stderr
            os.dup2(saved, 2)
            os.close(saved)
        if path is None:
            log.seek(0)
            raise BuildFailed(log.read()[-8000:])
    return path


def _library(
    root: Path, folder: str, name: str, units: list[Unit], link: str, flags: tuple[str, ...]
) -> Library:
    compiler, problem = find_compiler()
    if compiler is None:
        raise BuildFailed(problem)
    command = quote(compiler.command)
    return Library(
        folder=root / folder,
        name=name,
        compile=f"{command} -MD -MF $out.d $flags -c $in -o $out",
        link=f"{command} {link} $in -o $out $flags",
        link_flags=flags,
        units=units,
    )


def library(root: Path = ROOT) -> Path:
    """The shared library that registers the CUDA ops as CPU ops of the namespace fasttransfer_simt."""
    torch, problem = probe.find_torch()
    if torch is None:
        raise BuildFailed(problem)
    folder = "build/simt/library"
    flags = (*FLAGS, "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DFT_SIMT_COUNT", *contraction())
    names = ("-DFT_NAMESPACE=fasttransfer_simt", "-DFT_KEY=CPU", TORCH_TARGET, *torch_includes(torch))
    units = [Unit(s, f"{folder}/{Path(s).stem}.o", flags) for s in MACHINE]
    units += [Unit(s, f"{folder}/{Path(s).name}.o", ("-xc++", *flags, *names)) for s in sources(root)]
    link = (f"-L{torch.root / 'lib'}", *TORCH_LIBRARIES)
    return _make(root, _library(root, folder, "libfasttransfer_simt.so", units, "-shared", link))


def program(name: str, sanitizer: str, root: Path = ROOT, output: str | None = None) -> Path:
    """A standalone program: selftest.cpp, or cases_<op>.cpp over kernels without torch."""
    build = SANITIZERS[sanitizer]
    folder = output or f"build/simt/{name}-{sanitizer}"
    source = f"tests/simt/{name}.cpp"
    flags = (*FLAGS, *build.both, *contraction())
    units = [Unit(s, f"{folder}/{Path(s).stem}.o", flags) for s in MACHINE]
    units.append(Unit(source, f"{folder}/{name}.o", (*flags, *build.kernels)))
    return _make(root, _library(root, folder, name, units, "", (*build.both, *build.kernels)))


if __name__ == "__main__":
    try:
        print(program(sys.argv[2], sys.argv[1]) if len(sys.argv) == 3 else library())
    except BuildFailed as failed:
        sys.exit(str(failed))
