"""Compile the CUDA kernels, `fasttransfer/_cuda.so`: one object per csrc/cuda/*.cu, all architectures in each.

A library of its own because it needs a symbol (the current stream) that only CUDA builds of torch have. It knows
neither Python nor a version of torch: torch.ops.load_library loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import architectures as arch
from .compile import TORCH_LIBRARIES, TORCH_TARGET, is_debug, torch_includes
from .decide import BuildError
from .ninja_file import Library, Unit, make, quote
from .nvcc import Nvcc
from .probe import CXX_STANDARD, Torch

NAME = "_cuda.so"
HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"

# What ptxas says of every kernel goes to $out.log, for ptxas_check; only warnings and errors are shown.
COMPILE = (
    "if $nvcc -MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1; "
    "then grep -i -A3 warning $out.log || true; else cat $out.log; false; fi"
)


def object_dir(root: Path) -> Path:
    return root / "build" / f"cuda-{sys.implementation.cache_tag}"


def units(
    root: Path, folder: Path, nvcc: Nvcc, torch: Torch, architectures: Sequence[str], debug: bool
) -> list[Unit]:
    flags = (
        *(
            "-ccbin",
            nvcc.host,
            CXX_STANDARD,
            "-O3",
            "--expt-relaxed-constexpr",
            *(["-lineinfo"] if debug else []),
        ),
        *("-Xcompiler", HOST_FLAGS, "-Xptxas", "-v", "-Icsrc", "-DUSE_CUDA", TORCH_TARGET),
        *torch_includes(torch),
        *arch.flags(architectures),
    )
    objects = folder.relative_to(root)
    sources = sorted(root.glob("csrc/cuda/*.cu"))
    return [Unit(str(path.relative_to(root)), f"{objects}/{path.stem}.o", flags) for path in sources]


def link_flags(nvcc: Nvcc, torch: Torch, debug: bool) -> tuple[str, ...]:
    """The CUDA runtime is linked in and hidden: torch brings another copy, perhaps of another version."""
    runtime = (nvcc.runtime, "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread")
    strip = () if debug else ("-s",)
    return (*strip, *runtime, f"-L{torch.root / 'lib'}", *TORCH_LIBRARIES)


def library(
    root: Path, folder: Path, nvcc: Nvcc, torch: Torch, architectures: Sequence[str], debug: bool = False
) -> Library:
    return Library(
        folder=folder,
        name=NAME,
        compile=COMPILE.replace("$nvcc", quote([nvcc.path])),
        link=f"{quote([nvcc.host])} -shared $in -o $out $flags",
        link_flags=link_flags(nvcc, torch, debug),
        units=units(root, folder, nvcc, torch, architectures, debug),
    )


def build_library(
    root: Path, nvcc: Nvcc, torch: Torch, architectures: Sequence[str], environ: Mapping[str, str]
) -> Path:
    """Compile and link what is out of date; return the path of the shared library."""
    todo = library(root, object_dir(root), nvcc, torch, architectures, is_debug(environ))
    path = make(root, todo, environ)
    if path is None:
        raise BuildError(
            "compiling the CUDA kernels failed (nvcc's messages are above). "
            "FASTTRANSFER_CUDA=0 installs the package without them."
        )
    return path
