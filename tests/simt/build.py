"""Compile the kernels of csrc/cuda for the CPU: the library of the backend `simt`, and standalone programs.

python -m tests.simt.build                     # the library, into build/simt
python -m tests.simt.build asan cases_kd_row   # a program and its sanitizer: plain, asan or tsan
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from build_tools import probe
from build_tools.compile import TORCH_LIBRARIES, TORCH_TARGET, torch_includes
from build_tools.ninja_file import Library, Unit, jobs, make, quote

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
    "plain": Sanitizer(("-O1", "-DFT_SIMT_COUNT"), ()),
    "asan": Sanitizer(("-O1", "-DFT_SIMT_COUNT", "-DFT_SIMT_ASAN", *ASAN), ()),
    # GCC's TSan does not follow a struct passed by value to a call: functions of kernels are always inlined.
    "tsan": Sanitizer(("-O1", "-DFT_SIMT_TSAN"), ("-fsanitize=thread",)),
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


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process of pytest-xdist builds, the others wait and find it built."""
    folder = root / "build/simt"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    compiler, problem = find_compiler()
    if compiler is None:
        raise BuildFailed(problem)
    command = quote(compiler.command)
    library = Library(
        folder=root / folder,
        name="libfasttransfer_simt.so",
        compile=f"{command} -MD -MF $out.d $flags -c $in -o $out",
        link=f"{command} -shared $in -o $out $flags",
        link_flags=(f"-L{torch.root / 'lib'}", *TORCH_LIBRARIES),
        units=units,
    )
    with _alone(root):
        return _make(root, library)


@dataclass(frozen=True)
class Programs:
    """The standalone programs, cases_<op>.cpp over kernels without torch and selftest.cpp, one per sanitizer."""

    folder: str = "build/simt/programs"
    flags: tuple[str, ...] = (*FLAGS, "-g1")
    machine: tuple[str, ...] = MACHINE  # compiled once per sanitizer

    def path(self, name: str, sanitizer: str) -> str:
        return f"{self.folder}/{sanitizer}/{name}"

    def write(self, root: Path) -> Path:
        """A ninja file of all of them: redone is what has a new source, header or flag."""
        from ninja import ninja_syntax

        compiler, problem = find_compiler()
        if compiler is None:
            raise BuildFailed(problem)
        command = quote(compiler.command)
        file = root / self.folder / "build.ninja"
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")  # ninja of another process never sees half of it
        with new.open("w") as stream:
            ninja = ninja_syntax.Writer(stream, width=200)
            ninja.variable("builddir", self.folder)
            ninja.rule(
                "compile", f"{command} -MD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc"
            )
            ninja.rule("link", f"{command} $flags $in -o $out")
            for sanitizer, build in SANITIZERS.items():
                flags = (*self.flags, *build.both, *contraction())
                machine = [f"{self.folder}/{sanitizer}/{Path(source).stem}.o" for source in self.machine]
                for source, target in zip(self.machine, machine, strict=True):
                    ninja.build(target, "compile", source, variables={"flags": quote(flags)})
                for name in names():
                    target = self.path(name, sanitizer)
                    kernels = quote((*flags, *build.kernels))
                    source = f"tests/simt/{name}.cpp"
                    ninja.build(f"{target}.o", "compile", source, variables={"flags": kernels})
                    ninja.build(target, "link", [f"{target}.o", *machine], variables={"flags": kernels})
        new.replace(file)
        return file

    def build(self, wanted: Iterable[tuple[str, str]], root: Path = ROOT) -> None:
        """Compiles and links these (name, sanitizer), as many at once as there are processors."""
        import ninja

        file = self.write(root).relative_to(root)
        targets = [self.path(name, sanitizer) for name, sanitizer in wanted]
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(file), *jobs(os.environ), *targets]
        with _alone(root):
            done = subprocess.run(
                command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        if done.returncode != 0:
            raise BuildFailed(done.stdout[-8000:])


def names(root: Path = ROOT) -> list[str]:
    """The slowest to compile first."""
    cases = [path.stem for path in root.glob("tests/simt/cases_*.cpp")]
    return [*sorted(cases, key=lambda name: (not name.startswith("cases_kd_"), name)), "selftest"]


def program(name: str, sanitizer: str) -> Path:
    """One standalone program, built."""
    programs = Programs()
    programs.build([(name, sanitizer)])
    return ROOT / programs.path(name, sanitizer)


if __name__ == "__main__":
    try:
        print(program(sys.argv[2], sys.argv[1]) if len(sys.argv) == 3 else library())
    except BuildFailed as failed:
        sys.exit(str(failed))
