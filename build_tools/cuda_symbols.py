"""Would the CUDA library load? `python -m build_tools.cuda_symbols [_cuda.so | WHEEL]`, on a machine without a GPU.

Every symbol that it takes from elsewhere must be one that the C and C++ libraries provide, or torch: exported by the
torch that is installed here, or known to be in CUDA builds of torch only; and all of torch's must be in torch 2.10,
the oldest that fasttransfer supports. Then the library is loaded for real, with a stand-in for the symbols of CUDA
builds, and must register its kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .compile_cuda import NAME
from .probe import find_torch
from .ptxas_check import check_dir

# What only CUDA builds of torch export (libtorch_cuda.so).
CUDA_ONLY = frozenset({"aoti_torch_get_current_cuda_stream"})

# The headers gate only part of the interface by version (torch/csrc/stable/c/shim.h does, torch/csrc/inductor/
# aoti_torch/c/shim.h does not), so that the oldest torch is asked itself: this is what it exports.
OLDEST_TORCH_EXPORTS = Path(__file__).with_name("torch_2_10_exports.txt")

SYSTEM = re.compile(r"@+(GLIBC|GLIBCXX|CXXABI|GCC|LIBC)_")  # versioned symbols of libc, libstdc++, libgcc


@dataclass(frozen=True)
class Symbols:
    """What a library takes from others, sorted by where it comes from."""

    system: tuple[str, ...]
    torch: tuple[str, ...]
    wrong: tuple[str, ...]  # a sentence each


def undefined(listing: str) -> list[str]:
    """The names in the output of `nm -D --undefined-only`; weak ones, which may be absent, are left out."""
    lines = [line.split() for line in listing.splitlines()]
    return [words[-1] for words in lines if len(words) >= 2 and words[-2] == "U"]


def sort_out(needed: Iterable[str], exported: frozenset[str], cxx: frozenset[str]) -> Symbols:
    """`exported`: what the installed torch's libraries define, `cxx`: what libstdc++ does."""
    oldest = frozenset(OLDEST_TORCH_EXPORTS.read_text().split())
    system, torch, wrong = [], [], []
    for name in needed:
        # A few of libstdc++'s come without a version: libtorch_cpu.so has copies of them, and is linked first.
        if SYSTEM.search(name) or name in cxx:
            system.append(name)
            continue
        torch.append(name)
        if name not in exported and name not in CUDA_ONLY:
            wrong.append(f"{name}: neither torch nor the C and C++ libraries have it")
        elif name not in oldest:
            wrong.append(f"{name}: torch 2.10 does not have it")
    return Symbols(tuple(system), tuple(torch), tuple(wrong))


def newest_versions(system: Iterable[str]) -> dict[str, str]:
    """The newest version of each system library that is asked for: {"GLIBC": "2.34", ...}."""
    found: dict[str, tuple[int, ...]] = {}
    for name in system:
        if match := re.search(r"@+([A-Z]+)_([\d.]+)$", name):
            version = tuple(int(number) for number in match[2].split("."))
            found[match[1]] = max(found.get(match[1], ()), version)
    return {family: ".".join(map(str, version)) for family, version in sorted(found.items())}


def spoken(versions: dict[str, str]) -> str:
    return ", ".join(f"{family} {version}" for family, version in versions.items())


def nm(path: Path, *flags: str) -> str:
    done = subprocess.run(["nm", "-D", *flags, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def exports(libraries: Iterable[Path]) -> frozenset[str]:
    """The names that these define, without their versions; libraries that are absent define none."""
    lines = [line for path in libraries if path.is_file() for line in nm(path, "--defined-only").splitlines()]
    return frozenset(line.split()[-1].partition("@")[0] for line in lines)


def torch_exports(torch: Path) -> frozenset[str]:
    names = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libtorch_cuda.so", "libc10_cuda.so")
    return exports(torch / "lib" / name for name in names)


def cxx_exports() -> frozenset[str]:
    command = ["g++", "-print-file-name=libstdc++.so.6"]
    return exports([Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())])


# In a process of its own: the stand-in must be there before the library, and a crash is then a finding.
LOAD = """
import ctypes, sys, torch
library, stand_in, *operations = sys.argv[1:]
if torch.version.cuda is None:
    ctypes.CDLL(stand_in, mode=ctypes.RTLD_GLOBAL)
lib = torch.library.Library("fasttransfer", "FRAGMENT")
torch.ops.load_library(library)
print(sorted(n for n in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA") if "fasttransfer::" in n))
"""


def load(library: Path) -> str:
    """The operations that it registers under CUDA, as torch lists them. Raises CalledProcessError, OSError."""
    with tempfile.TemporaryDirectory(prefix="fasttransfer-symbols-") as folder:
        source, stand_in = Path(folder, "stand_in.c"), Path(folder, "stand_in.so")
        source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(CUDA_ONLY)))
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(stand_in)], check=True)
        command = [sys.executable, "-c", LOAD, str(library.resolve()), str(stand_in)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The library itself: of a wheel, what is in it."""
    if path.suffix != ".whl":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="fasttransfer-wheel-") as folder, zipfile.ZipFile(path) as wheel:
        yield Path(wheel.extract(f"fasttransfer/{NAME}", folder))


def default_library(root: Path) -> Path | None:
    """The one that is built into the package, else that of ptxas_check."""
    candidates = (root / "fasttransfer" / NAME, check_dir(root) / NAME)
    return next((path for path in candidates if path.is_file()), None)


def main(arguments: list[str]) -> int:
    given = Path(arguments[0]) if arguments else default_library(Path.cwd())
    torch, problem = find_torch()
    if given is None or torch is None or shutil.which("nm") is None:
        print(
            f"cuda_symbols: cannot check: {problem or ('nm was not found' if given else f'no {NAME} was built')}"
        )
        return 2
    with unpacked(given) as library:
        needed = undefined(nm(library, "--undefined-only"))
        symbols = sort_out(needed, torch_exports(torch.root), cxx_exports())
        print(f"{given}: {len(symbols.system)} symbols of {spoken(newest_versions(symbols.system))}")
        print(f"{len(symbols.torch)} of torch: {', '.join(sorted(symbols.torch))}")
        for line in symbols.wrong:
            print(f"cuda_symbols: {line}", file=sys.stderr)
        try:
            registered = load(library)
        except subprocess.CalledProcessError as error:
            print(f"cuda_symbols: it does not load: {error.stderr or error}", file=sys.stderr)
            return 1
    print(f"loads into torch {torch.version} and registers for CUDA: {registered}")
    return 1 if symbols.wrong or registered == "[]" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
