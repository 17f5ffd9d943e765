"""What the figures depend on: the machine, the versions, and whether others were using the machine meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from typing import Any

import torch

import fasttransfer


def environment() -> dict[str, Any]:
    """What the figures depend on: processor, SIMD level, threads, versions, commit."""
    info = fasttransfer.build_info()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": info["simd_level"] or "none (pure torch)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git_commit(),
        "gpu": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none (not yet measured on one)",
        "memory_gb": memory_gb(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "build": info,
    }


def cpu_model() -> str:
    """The processor's name as the kernel gives it, or what Python knows of it elsewhere."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def memory_gb() -> float | None:
    """Memory of the machine in 1e9 bytes; None where it is not told."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (ValueError, OSError, AttributeError):
        return None


def git_commit() -> str:
    """The short commit of the code that ran, with `+` where files differ from it; `unknown` outside git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


class OtherLoad:
    """Processor time that others used between two moments. Medians of a shared machine are not figures of it.

    Linux only (`/proc/stat` counts the whole machine); elsewhere nothing is known, which reads as nothing used.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def since(self) -> tuple[float, float]:
        """Seconds on the clock, and seconds of processor time not used by this process, since its making."""
        now = self._now()
        if self._start is None or now is None:
            return 0.0, 0.0
        wall, machine, own = (end - start for end, start in zip(now, self._start, strict=True))
        return wall, machine - own

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds on the clock, of all processors being busy, and of this process."""
        try:
            with open("/proc/stat") as lines:
                user, nice, system, _idle, _io, irq, soft, steal = map(int, next(lines).split()[1:9])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()
