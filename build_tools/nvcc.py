"""Find a CUDA compiler that works: the toolkit's, or the one that pip installs. `python -m build_tools.nvcc` tells.

`pip install nvidia-cuda-nvcc nvidia-cuda-cccl` puts nvcc, its headers and the static runtime into
site-packages/nvidia/cu13, beside the CUDA libraries that a CUDA torch brings along.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .architectures import capability

OLDEST = (12, 0)  # C++20

# What a kernel needs of an installation: a host compiler that nvcc accepts, its headers (pip's lack nv/target, which
# is in another package), the device compiler behind it.
PROBE = (
    "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n__global__ void probe() {}\n"
)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that was seen to work."""

    path: str
    version: str  # "13.0"
    supported: tuple[str, ...]  # compute capabilities
    runtime: str  # libcudart_static.a
    host: str  # the C++ compiler it calls

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])


def find_nvcc(environ: Mapping[str, str], host: str) -> tuple[Nvcc | None, str | None]:
    """(nvcc, problem), one of them None: the first that works, or what is wrong with the first."""
    problems = []
    for path in dict.fromkeys(candidates(environ)):
        nvcc, problem = examine(path, host)
        if nvcc:
            return nvcc, None
        problems.append(problem)
    if problems:
        return None, problems[0]
    asked = next((name for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)), None)
    if asked:
        return None, f"nvcc was not found: {asked}={environ[asked]} has no bin/nvcc"
    return None, (
        "nvcc was not found (looked in PATH, /usr/local/cuda and site-packages/nvidia; CUDA_HOME names another "
        "place, `pip install nvidia-cuda-nvcc nvidia-cuda-cccl` installs one)"
    )


def candidates(environ: Mapping[str, str]) -> Iterator[str]:
    """Every nvcc, best first. CUDA_HOME or CUDA_PATH, where set, is the only place that is looked at."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(name):
            places = [os.path.join(environ[name], "bin")]
            break
    else:
        of_pip = [str(path) for root in pip_roots() for path in sorted(root.glob("c*/bin"), reverse=True)]
        places = [environ.get("PATH", ""), "/usr/local/cuda/bin", *of_pip]
    for place in places:
        if found := shutil.which("nvcc", path=place):
            yield found


def pip_roots() -> list[Path]:
    """Every site-packages/nvidia: what can be imported and, since build isolation hides it, this environment's own."""
    spec = find_spec("nvidia")
    importable = list(spec.submodule_search_locations or []) if spec else []
    own = [os.path.join(sysconfig.get_path(name), "nvidia") for name in ("purelib", "platlib")]
    return [Path(root) for root in dict.fromkeys([*importable, *own])]


def examine(path: str, host: str) -> tuple[Nvcc | None, str | None]:
    """Ask this nvcc for its version and architectures, and compile four lines with it."""
    said, problem = ask(path, "--version")
    match = re.search(r"release (\d+)\.(\d+)", said)
    if problem or match is None:
        return None, f"{path} does not run ({problem or 'it does not say its version'})"
    if (int(match[1]), int(match[2])) < OLDEST:
        return None, f"{path} is of CUDA {match[1]}.{match[2]}, older than {'.'.join(map(str, OLDEST))}"
    codes, problem = ask(path, "--list-gpu-code")
    runtime = static_runtime(path)
    if problem or runtime is None:
        return None, problem or f"libcudart_static.a was not found beside {path}"
    if problem := try_compile(path, host):
        return None, f"{path} failed on a four-line kernel ({problem})"
    supported = tuple(capability(code) for code in codes.split())
    return Nvcc(path, f"{match[1]}.{match[2]}", supported, runtime, host), None


def ask(path: str, question: str) -> tuple[str, str | None]:
    """(what it prints, problem)."""
    try:
        done = subprocess.run([path, question], capture_output=True, text=True)
    except OSError as error:
        return "", str(error)
    return done.stdout, None if done.returncode == 0 else first_error(done.stdout + done.stderr)


def static_runtime(path: str) -> str | None:
    """The CUDA runtime to link. nvcc itself says where its toolkit is: the path may be that of a wrapper."""
    done = subprocess.run([path, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    match = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.MULTILINE)
    top = Path(match[1].strip() if match else Path(path).resolve().parent.parent)
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (library := top / folder / "libcudart_static.a").is_file():
            return str(library.resolve())
    return None


def try_compile(path: str, host: str) -> str | None:
    """None where a kernel compiles, else the first error."""
    with tempfile.TemporaryDirectory(prefix="fasttransfer-probe-") as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        line = [path, "-ccbin", host, "-std=c++20", "-cubin", str(source), "-o", f"{source}.cubin"]
        done = subprocess.run(line, capture_output=True, text=True)
    return None if done.returncode == 0 else first_error(done.stdout + done.stderr)


def first_error(output: str) -> str:
    lines = output.strip().splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


def host_of(command: tuple[str, ...]) -> str:
    """The compiler itself for -ccbin, which takes no launcher (`ccache g++`)."""
    return shutil.which(command[-1]) or shlex.join(command)


if __name__ == "__main__":
    nvcc, why = find_nvcc(os.environ, "g++")
    print(nvcc.path if nvcc else why)
    sys.exit(nvcc is None)
