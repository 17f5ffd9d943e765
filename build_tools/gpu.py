"""Everything that needs a GPU, in ten minutes: `make gpu`, or `python -m build_tools.gpu` with a Python that has torch.

Builds the CUDA kernels for this card into the source tree, runs the tests on it, compute-sanitizer over a short set,
and the benchmarks. Exits with 1 where there is no GPU, where a test or the sanitizer finds something, where a result
is wrong; never because of a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from . import compile as native
from . import compile_cuda
from .decide import BuildError, decide, describe
from .ninja_file import install

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 10
BEGAN = time.monotonic()


def card() -> tuple[str, str]:
    """(compute capability, name) of the GPU; SystemExit with one line where there is none."""
    if find_spec("torch") is None:
        raise SystemExit(
            f"make gpu: {sys.executable} has no torch (make gpu PYTHON=... names another Python)"
        )
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"make gpu: torch {torch.__version__} of {sys.executable} finds no GPU: nothing was run"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}", torch.cuda.get_device_name()


def left() -> float:
    return MINUTES * 60 - (time.monotonic() - BEGAN)


def say(what: str) -> None:
    print(f"==== {what} ({time.monotonic() - BEGAN:.0f} s)", flush=True)


def build(capability: str) -> None:
    """Both libraries and their record, in the source tree, which is what the steps below import."""
    plan = decide({**os.environ, "FASTTRANSFER_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}, ROOT)
    torch, compiler, nvcc = plan.facts.torch, plan.facts.compiler, plan.facts.nvcc
    assert torch is not None
    assert nvcc is not None
    package = ROOT / "fasttransfer"
    library = compile_cuda.build_library(ROOT, nvcc, torch, plan.architectures, os.environ)
    install(library, package / compile_cuda.NAME)
    if plan.native.build and compiler is not None:
        library = native.build_library(ROOT, compiler, torch, os.environ)
        install(library, package / native.library_name())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    record = plan.record(version[1] if version else "unknown")
    (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
    print(describe(record))


def run(command: list[str], most: float, **variables: str) -> int:
    """The exit status; 124 where it took longer than `most` seconds or than there is time."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "FASTTRANSFER_BACKEND": "auto", **variables}
    try:
        return subprocess.run(command, cwd=ROOT, env=environ, timeout=max(1.0, min(most, left()))).returncode
    except subprocess.TimeoutExpired:
        print(f"out of time: {' '.join(command)}", flush=True)
        return 124


def sanitize(tool: str) -> bool:
    """compute-sanitizer over gpu_calls.py; True where it finds nothing, or is not to be had."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        print("compute-sanitizer was not found: left out")
        return True
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "build_tools.gpu_calls",
    ]
    # Every tensor gets memory of its own, so that its end is an end.
    status = run(command, 100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status == 0:
        return True
    if status == 9:
        return False
    print(
        f"compute-sanitizer could not run to its end here (exit status {status}): nothing is known",
        flush=True,
    )
    return True


def main(arguments: list[str]) -> int:
    capability, name = card()
    say(f"{name}, sm_{capability.replace('.', '')}: build")
    try:
        build(capability)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = {}
    say("tests")
    tests = [
        "-m",
        "pytest",
        "tests",
        "-k",
        "cuda",
        "--ignore=tests/test_cuda_build.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    outcome["tests"] = run([sys.executable, *tests], 200) == 0
    for tool in ("memcheck", "racecheck"):
        say(f"compute-sanitizer, {tool}")
        outcome[tool] = sanitize(tool)
    say("benchmarks")
    limit = str(max(10, int(left() - 60)))
    outcome["benchmarks"] = (
        run([sys.executable, "-m", "benchmarks.gpu", "--limit", limit, *arguments], left()) == 0
    )
    say(", ".join(f"{step}: {'ok' if ok else 'FAILED'}" for step, ok in outcome.items()))
    return 0 if all(outcome.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
