"""Which compiled parts a build gets, and the sentence that says why.

`decide_native` and `decide_cuda` are pure functions of a setting and of the facts that `probe` gathered, so
that each outcome has a test without a machine to match.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import architectures as arch
from .probe import Facts, look_around

CHOICES = ("auto", "0", "1")


class BuildError(Exception):
    """The build cannot do what its environment asks for. The message is for the person who asked."""


@dataclass(frozen=True)
class Decision:
    build: bool
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything that the build commands need to know."""

    native: Decision
    cuda: Decision
    requested: dict[str, str]
    facts: Facts
    architectures: tuple[str, ...] = ()  # what the CUDA kernels are compiled for

    def record(self, version: str) -> dict[str, object]:
        """The contents of `fasttransfer/_build.json`."""
        torch = self.facts.torch if self.native.build or self.cuda.build else None
        compiler = self.facts.compiler if self.native.build else None
        nvcc = self.facts.nvcc if self.cuda.build else None
        return {
            "version": version,
            "native": self.native.build,
            "native_reason": self.native.reason,
            "cuda": self.cuda.build,
            "cuda_reason": self.cuda.reason,
            "requested": self.requested,
            "torch": torch.version if torch else None,
            "compiler": compiler.version if compiler else None,
            "levels": list(compiler.levels) if compiler else [],
            "cuda_version": nvcc.version if nvcc else None,
            "architectures": list(self.architectures),
        }


def read_choice(environ: Mapping[str, str], name: str) -> str:
    """The value of a tri-state environment variable; unset and empty mean `auto`."""
    value = environ.get(name, "").strip() or "auto"
    if value not in CHOICES:
        raise BuildError(
            f"{name}={value!r} is not understood. Accepted: auto (build it where possible), "
            "1 (build it or fail), 0 (do not build it)."
        )
    return value


def local_version(environ: Mapping[str, str]) -> str:
    """What `FASTTRANSFER_LOCAL_VERSION` appends to the version, with its plus sign; nothing where it is not set."""
    value = environ.get("FASTTRANSFER_LOCAL_VERSION", "").strip()
    if value and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", value):
        raise BuildError(
            f"FASTTRANSFER_LOCAL_VERSION={value!r} is not understood. Accepted: small letters and digits, with single "
            "dots between them, such as cu128."
        )
    return f"+{value}" if value else ""


def decide_native(requested: str, facts: Facts) -> Decision:
    """Whether the CPU kernels are compiled. Raises BuildError where `1` was asked and cannot be had."""
    if requested == "0":
        return Decision(False, "FASTTRANSFER_NATIVE=0 was set")
    problem = (
        facts.sources_problem
        or facts.platform_problem
        or facts.compiler_problem
        or facts.tools_problem
        or facts.torch_problem
    )
    if problem and requested == "1":
        raise BuildError(
            f"FASTTRANSFER_NATIVE=1 asks for the native CPU kernels, but {problem}. "
            "Mend that, or set FASTTRANSFER_NATIVE=auto or 0 to install the pure-torch package."
        )
    if problem:
        return Decision(False, problem)
    assert facts.compiler is not None
    assert facts.torch is not None
    return Decision(True, f"compiled with {facts.compiler.version} against torch {facts.torch.version}")


def decide_cuda(requested: str, facts: Facts) -> Decision:
    """Whether the CUDA kernels are compiled. Asks for no GPU: build machines and containers have none."""
    if requested == "0":
        return Decision(False, "FASTTRANSFER_CUDA=0 was set")
    problem = cuda_problem(requested, facts)
    if problem and requested == "1":
        raise BuildError(
            f"FASTTRANSFER_CUDA=1 asks for the CUDA kernels, but {problem}. "
            "Mend that, or set FASTTRANSFER_CUDA=auto or 0 to install without them."
        )
    if problem:
        return Decision(False, problem)
    assert facts.nvcc is not None
    assert facts.torch is not None
    built = f"compiled with nvcc {facts.nvcc.version} ({facts.nvcc.path}) against torch {facts.torch.version}"
    return Decision(True, built)


def cuda_problem(requested: str, facts: Facts) -> str | None:
    """What keeps the CUDA kernels from being built."""
    if not facts.cuda_sources:
        return "this version has no CUDA sources (csrc/cuda/*.cu)"
    problem = facts.platform_problem or facts.compiler_problem or facts.torch_problem or facts.tools_problem
    if problem:
        return problem
    assert facts.torch is not None
    ours = facts.torch.cuda
    if requested == "auto" and ours is None:
        return (
            f"torch {facts.torch.version} is not a CUDA build (FASTTRANSFER_CUDA=1 builds them all the same)"
        )
    if facts.nvcc is None:
        return facts.nvcc_problem or "nvcc was not found"
    if requested == "auto" and ours is not None and facts.nvcc.major > int(ours.partition(".")[0]):
        # The runtime that is linked in asks for a driver of its own major version; torch's driver may be older.
        return (
            f"nvcc {facts.nvcc.version} ({facts.nvcc.path}) is newer than the CUDA {ours} of torch "
            f"{facts.torch.version} and may need a newer driver (FASTTRANSFER_CUDA=1 builds them all the same)"
        )
    return None


def decide(environ: Mapping[str, str], root: Path) -> Plan:
    """The whole plan for the source tree at `root`."""
    requested = {
        "native": read_choice(environ, "FASTTRANSFER_NATIVE"),
        "cuda": read_choice(environ, "FASTTRANSFER_CUDA"),
    }
    facts = look_around(environ, root, requested["cuda"])
    native, cuda = decide_native(requested["native"], facts), decide_cuda(requested["cuda"], facts)
    architectures: tuple[str, ...] = ()
    if cuda.build and facts.nvcc is not None:
        try:
            architectures = arch.choose(environ.get("TORCH_CUDA_ARCH_LIST"), facts.nvcc.supported)
        except arch.ArchitectureError as error:
            raise BuildError(str(error)) from None
    return Plan(native, cuda, requested, facts, architectures)


def describe(record: Mapping[str, object]) -> str:
    """The decisions of a build for a person to read; `record` is what `_build.json` holds."""
    native = "yes" if record["native"] else "NO, pure torch instead"
    lines = [f"native CPU kernels: {native}: {record['native_reason']}"]
    levels = record["levels"]
    if isinstance(levels, list) and levels:
        lines.append(f"SIMD levels: {', '.join(levels)}")
    lines.append(f"CUDA kernels: {'yes' if record['cuda'] else 'no'}: {record['cuda_reason']}")
    architectures = record["architectures"]
    if isinstance(architectures, list) and architectures:
        lines.append(f"CUDA architectures: {', '.join(architectures)} (TORCH_CUDA_ARCH_LIST names others)")
    return "\n".join(f"fasttransfer: {line}" for line in lines)
