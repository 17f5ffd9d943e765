"""Which GPUs the CUDA kernels are compiled for: TORCH_CUDA_ARCH_LIST as torch reads it, or a default.

An architecture is written as in that variable: "9.0" is machine code for compute capability 9.0, "9.0+PTX" also
the intermediate code that a later GPU's driver can translate, "9.0a" code for that one GPU and no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Machine code runs on later minor versions of its major version (8.0 on 8.6 and 8.9), so this is every GPU from
# Turing on, and what comes after them through PTX.
DEFAULT = ("7.5", "8.0", "9.0", "10.0", "12.0")

# torch.utils.cpp_extension's names, those of several words first because the list is replaced in.
NAMES = {
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}

PATTERN = re.compile(r"(\d+\.\d)([af]?)(\+PTX)?")
Supported = Sequence[str]  # compute capabilities that nvcc compiles for: ("7.5", "8.0", ...)


class ArchitectureError(ValueError):
    """TORCH_CUDA_ARCH_LIST asks for something that is no architecture, or that nvcc does not know."""


def choose(asked: str | None, supported: Supported) -> tuple[str, ...]:
    """The architectures to compile for, oldest first; `asked` is the value of TORCH_CUDA_ARCH_LIST."""
    return parse(asked, supported) if asked and asked.strip(" ;,") else default(supported)


def default(supported: Supported) -> tuple[str, ...]:
    """Those of DEFAULT that nvcc knows, the newest with PTX."""
    known = [name for name in DEFAULT if name in supported] or sorted(supported, key=float)[-1:]
    return (*known[:-1], known[-1] + "+PTX")


def parse(asked: str, supported: Supported) -> tuple[str, ...]:
    """Separated by spaces, commas or semicolons; each architecture once, with PTX if any mention has it."""
    for name, meant in NAMES.items():
        asked = asked.replace(name, meant)
    found: dict[str, bool] = {}
    for word in re.split(r"[;,\s]+", asked.strip(" ;,")):
        match = PATTERN.fullmatch(word)
        if match is None:
            raise ArchitectureError(
                f"TORCH_CUDA_ARCH_LIST: {word!r} is not understood. Accepted: compute capabilities such as "
                f"8.0, 9.0a or 9.0+PTX, separated by ';', and {', '.join(NAMES)}."
            )
        number, suffix, ptx = match.groups()
        if number not in supported:
            raise ArchitectureError(
                f"TORCH_CUDA_ARCH_LIST: this nvcc does not compile for {number}. "
                f"It does for {', '.join(sorted(supported, key=float))}."
            )
        found[number + suffix] = found.get(number + suffix, False) or bool(ptx)
    return tuple(
        name + "+PTX" * found[name]
        for name in sorted(found, key=lambda name: (float(name.rstrip("af")), name))
    )


def flags(architectures: Iterable[str]) -> list[str]:
    """nvcc's -gencode flags."""
    result = []
    for architecture in architectures:
        name, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
        code = name.replace(".", "")
        result.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            result.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return result


def capability(code: str) -> str:
    """'9.0' of nvcc's 'sm_90', '12.0a' of 'sm_120a'."""
    digits = code.removeprefix("sm_").removeprefix("compute_")
    suffix = digits[-1] if digits[-1].isalpha() else ""
    number = digits.removesuffix(suffix)
    return f"{number[:-1]}.{number[-1]}{suffix}"
