"""The backends that the suite runs on: what each is, whether it is here, and if not why.

An operation is defined by its pure-torch kernel (`reference`); everything else must agree with the same float64
oracle to the same bounds. A backend that is absent is skipped with the reason, never passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fasttransfer
from tests.simt import build, library

SIMD_LEVELS = ("avx512", "avx2", "baseline")
# The suite runs on each of these. `simt`: the kernels of csrc/cuda, run on the CPU by tests/simt.
BACKENDS = ("reference", *(f"cpu-{level}" for level in SIMD_LEVELS), "simt", "cuda")


def default_backend() -> str:
    """The one that a user of this machine's CPU gets: for tests that are about torch, not about the arithmetic."""
    info = fasttransfer.build_info()
    return f"cpu-{info['simd_levels'][0]}" if info["cpu_kernels"] else "reference"


def why_not(backend: str) -> str | None:
    """Why `backend` cannot run here, in the words of `build_info()`; None where it can."""
    info = fasttransfer.build_info()
    if backend == "reference":
        return None
    if backend == "cuda":
        if not info["cuda_kernels"]:
            return f"no CUDA kernels: {info['cuda_reason']}"
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if backend == "simt":
        return build.why_not()
    if not info["cpu_kernels"]:
        return f"no native CPU kernels: {info['cpu_reason']}"
    level = backend.removeprefix("cpu-")
    if level not in info["simd_levels"]:
        return (
            f"SIMD level {level} was not built or this CPU lacks it; here: {', '.join(info['simd_levels'])}"
        )
    return None


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Within the context the operations run on `backend`, and tensors are created on its device."""
    if backend == "reference":
        with fasttransfer.use_backend("reference"):
            yield
    elif backend == "simt":
        # Built when first used. What does not compile is an error, not a reason to skip.
        with library.swapped_in(missing=pytest.skip):
            yield
    elif backend == "cuda":
        with torch.device("cuda"):
            yield
    elif backend.startswith("cpu-"):
        with fasttransfer.simd_level(backend.removeprefix("cpu-")):
            assert fasttransfer.build_info()["simd_level"] == backend.removeprefix("cpu-")
            yield
    else:
        raise ValueError(f"no backend {backend!r}")
