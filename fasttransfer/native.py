"""The compiled libraries: loading them, telling what is active and why not, choosing a backend or a SIMD level."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fasttransfer.ops.library import force_reference, reference_forced

BACKENDS = ("auto", "reference", "native")
BUILT_WITH = ("torch", "compiler", "levels", "cuda_version", "architectures", "requested")

_record_file = Path(__file__).with_name("_build.json")
_cuda_file = Path(__file__).with_name("_cuda.so")
_C: ModuleType | None = None
_why_not = ""
_cuda_why_not = "not loaded"  # empty: the CUDA kernels are there


def _record() -> dict[str, Any]:
    try:
        record = json.loads(_record_file.read_text())
    except FileNotFoundError:
        return {
            "native": False,
            "native_reason": "this copy was never built (no _build.json); install with pip",
        }
    return dict(record)


def _setting(variable: str, accepted: tuple[str, ...]) -> str:
    value = os.environ.get(variable, "auto")
    if value not in accepted:
        raise ValueError(f"{variable} must be one of {', '.join(accepted)}, got {value!r}")
    return value


def load() -> None:
    """Load the compiled libraries as ``FASTTRANSFER_BACKEND`` and ``FASTTRANSFER_SIMD`` say. Called once, at import.

    Raises:
        ValueError: A variable holds something else than what it accepts.
        ImportError: ``FASTTRANSFER_BACKEND=native`` and there is nothing to load, or it does not load.
    """
    global _C, _why_not, _cuda_why_not
    backend = _setting("FASTTRANSFER_BACKEND", BACKENDS)
    record = _record()
    if backend == "reference":
        _why_not = _cuda_why_not = "FASTTRANSFER_BACKEND=reference"
        return
    _cuda_why_not = _load_cuda(record)
    if not record["native"]:
        _why_not = record["native_reason"]
    else:
        try:
            _C = import_module("fasttransfer._C")
        except (ImportError, OSError) as error:
            _why_not = f"built with torch {record.get('torch')}, but it does not load: {error}"
    if _C is None:
        if backend == "native":
            raise ImportError(f"FASTTRANSFER_BACKEND=native, but there are no native kernels: {_why_not}")
        if record.get("requested", {}).get("native") != "0":
            warnings.warn(
                f"fasttransfer runs in pure torch, without its native CPU kernels: {_why_not}", stacklevel=3
            )
        return
    _set_level(os.environ.get("FASTTRANSFER_SIMD", "auto"), "FASTTRANSFER_SIMD")


def _load_cuda(record: dict[str, Any]) -> str:
    """Register the CUDA kernels where torch has CUDA; why there are none, or nothing if there are.

    Asks neither for a GPU nor for anything that would start CUDA in this process: it could not fork any more.
    """
    if torch.version.cuda is None:
        built = f"built with CUDA {record.get('cuda_version')}, but torch {torch.__version__} has no CUDA"
        return built if record.get("cuda") else str(record.get("cuda_reason", "not built"))
    if not record.get("cuda"):
        why = str(record.get("cuda_reason", "not built"))
        unasked = record.get("requested", {}).get("cuda") != "0"
    else:
        why, unasked = _cuda_driver_problem(record), True
        if not why:
            try:
                torch.ops.load_library(str(_cuda_file))
                return ""
            except OSError as error:
                why = f"built with torch {record.get('torch')}, but it does not load: {error.__cause__ or error}"
    if unasked and _gpu_is_here():
        warnings.warn(
            f"fasttransfer runs in pure torch on the GPU, without its CUDA kernels: {why}", stacklevel=4
        )
    return why


def _cuda_driver_problem(record: dict[str, Any]) -> str:
    """The CUDA runtime in the library works with a driver of its own major version or a later one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""  # no driver, no GPU: nothing will be launched
    version = ctypes.c_int(0)
    built = str(record.get("cuda_version") or "0")
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value // 1000 >= int(
        built.partition(".")[0]
    ):
        return ""
    return (
        f"built with CUDA {built}, but the driver here is for CUDA {version.value // 1000}."
        f"{version.value % 1000 // 10}: update it, or rebuild fasttransfer with an older nvcc"
    )


def _gpu_is_here() -> bool:
    """Whether there is an NVIDIA GPU, as far as can be told without starting CUDA (Linux, WSL)."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")


def _set_level(level: str, source: str) -> None:
    assert _C is not None
    if not _C.set_simd_level(level):
        available = ", ".join(["auto", *_C.simd_levels()])
        raise ValueError(f"{source} must be one of {available} on this machine, got {level!r}")


def native_available() -> bool:
    """Whether the native CPU kernels are loaded."""
    return _C is not None


def simd_levels() -> list[str]:
    """SIMD levels that were built and that this CPU has, best first; empty without native kernels."""
    return [] if _C is None else list(_C.simd_levels())


@contextmanager
def simd_level(level: str) -> Iterator[None]:
    """Within the context the CPU kernels run at this SIMD level: one of ``simd_levels()``, or ``"auto"``.

    Process-wide, for tests and measurements.

    Raises:
        ValueError: A level that was not built or that this CPU does not have.
        RuntimeError: No native kernels are loaded.
    """
    if _C is None:
        raise RuntimeError(f"no native kernels are loaded: {_why_not}")
    before = _C.simd_level()
    _set_level(level, "level")
    try:
        yield
    finally:
        _C.set_simd_level(before)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the context the operations run on this backend: ``"reference"`` (pure torch), ``"native"``, ``"auto"``.

    Process-wide, for tests and measurements.

    Raises:
        ValueError: Another name.
        RuntimeError: ``"native"`` where no native kernels are loaded.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "native" and _C is None:
        raise RuntimeError(f"no native kernels are loaded: {_why_not}")
    before = reference_forced()
    force_reference(backend == "reference" and (_C is not None or not _cuda_why_not))
    try:
        yield
    finally:
        force_reference(before)


def version() -> str:
    """That of the build: ``fasttransfer.__version__``."""
    return str(_record().get("version", "unknown"))


def build_info() -> dict[str, Any]:
    """What is active in this process, and why what is not active is not. For bug reports.

    Returns:
        A dict with ``version``, ``torch``, ``python``, ``platform``, ``cpu_kernels`` (bool), ``cpu_reason``,
        ``simd_level``, ``simd_levels``, ``cuda_kernels`` (bool: loaded, whether or not there is a GPU),
        ``cuda_reason``, and ``built_with`` (the record of the build: its torch, compiler, levels, CUDA version and
        architectures, and what was requested).
    """
    record = _record()
    return {
        "version": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_kernels": _C is not None,
        "cpu_reason": "loaded" if _C is not None else _why_not,
        "simd_level": None if _C is None else _C.simd_level(),
        "simd_levels": simd_levels(),
        "cuda_kernels": not _cuda_why_not,
        "cuda_reason": _cuda_why_not or "loaded",
        "built_with": {k: record.get(k) for k in BUILT_WITH},
    }
