"""What a bug report needs to say of the machine and the build: ``python -m fasttransfer info``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fasttransfer.native import build_info

_VARIABLES = ("FASTTRANSFER_", "OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "CUDA_VISIBLE", "PYTORCH_")
_SINGLE = ("LD_PRELOAD", "THP_MEM_ALLOC_ENABLE", "TORCH_CUDA_ARCH_LIST")
_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
_PACKAGES = ("safetensors", "rich", "numpy")


def cpu_model() -> str:
    """The processor's name as the kernel gives it, or what Python knows of it elsewhere."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def system_info() -> dict[str, Any]:
    """``build_info()`` and what is around it: processor, threads, devices, versions, allocator, environment."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "build": build_info(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "devices": _devices(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "allocator": _allocator(),
        "huge_pages": _huge_pages(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) or name in _SINGLE
        },
    }


def as_text(info: dict[str, Any]) -> str:
    """One screen of it."""
    build = info["build"]
    built = build["built_with"]
    levels = ", ".join(build["simd_levels"]) or "none"
    cpu_kernels = (
        f"{build['simd_level']} (of {levels})" if build["cpu_kernels"] else f"none: {build['cpu_reason']}"
    )
    built_with = f"built with torch {built['torch']}, {built['compiler']}" if built["torch"] else "not built"
    torch_line = f"{build['torch']} (CUDA {info['torch_cuda'] or 'none'})"
    memory = f", {info['memory_gb']} GB" if info["memory_gb"] else ""
    rows = [
        ("fasttransfer", f"{build['version']}, {built_with}"),
        ("torch", torch_line),
        ("python", f"{build['python']} on {build['platform']}"),
        ("packages", ", ".join(f"{name} {v or 'absent'}" for name, v in info["packages"].items())),
        ("", ""),
        ("CPU", f"{info['cpu']}, {info['usable_cores']} of {info['cores']} cores{memory}"),
        ("CPU kernels", cpu_kernels),
        ("threads", f"{info['threads']} (torch)"),
        ("CUDA kernels", "loaded" if build["cuda_kernels"] else f"none: {build['cuda_reason']}"),
        *(("device", device) for device in info["devices"] or ["none but the CPU"]),
        ("", ""),
        ("allocator", info["allocator"]),
        ("huge pages", info["huge_pages"]),
        *(("set", f"{name}={value}") for name, value in info["environment"].items()),
    ]
    return "\n".join(f"{name:14}{value}".rstrip() for name, value in rows)


def _devices() -> list[str]:
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            found.append(f"cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 1e9:.0f} GB")
    for name in ("mps", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            found.append(name)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _allocator() -> str:
    """Which malloc is loaded; large results cost more with those that map them anew at each call."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    found = [name for name in _ALLOCATORS if name in maps]
    if found:
        return f"{', '.join(found)} (preloaded)"
    return "the system's: results above 32 MiB are mapped anew at each call (5-10x per element)"


def _huge_pages() -> str:
    try:
        choices = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    chosen = choices.partition("[")[2].partition("]")[0]
    torch_uses = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    note = (
        "THP_MEM_ALLOC_ENABLE=1: torch asks for them"
        if torch_uses
        else "torch asks with THP_MEM_ALLOC_ENABLE=1"
    )
    return f"{chosen}; {note}"
