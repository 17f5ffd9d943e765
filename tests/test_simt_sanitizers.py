"""The kernels of csrc/cuda on the CPU as standalone programs: plain, under AddressSanitizer and UBSan, under TSan."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.simt import build

HERE = Path(__file__).resolve().parent / "simt"
CASES = sorted(path.stem for path in HERE.glob("cases_*.cpp"))
pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", params=build.SANITIZERS)
def sanitizer(request):
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_path_of_the_kernels(name, sanitizer):
    """Buffers of exact size; results against double; threads and blocks from the first and from the last."""
    if name == "cases_kd" and sanitizer != "plain":
        pytest.skip("the programs of the single paths cover its kernels, and compile in half the time")
    if (
        name.startswith("cases_kd")
        and sanitizer != "plain"
        and not os.environ.get("FASTTRANSFER_SANITIZE_KD")
    ):
        pytest.skip("not part of CI yet: minutes of compiling; FASTTRANSFER_SANITIZE_KD=1 runs it")
    status, output = run(build.program(name, sanitizer))
    assert status == 0, output[-4000:]
    assert "checks, 0 failures" in output


def test_the_harness_finds_what_it_says(sanitizer):
    status, output = run(build.program("selftest", sanitizer))
    assert status == 0, output[-4000:]
    assert output.splitlines()[-1] == "0 failures"


# Kernels of selftest.cpp with an error that only a sanitizer sees, or sees at once.
@pytest.mark.parametrize(
    "sanitizer, kernel, words",
    [
        ("asan", 10, "heap-buffer-overflow"),  # behind the shared memory
        ("asan", 20, "heap-buffer-overflow"),  # behind a tensor
        ("asan", 21, "use-after-poison"),  # into a block that has exited
        ("tsan", 17, "data race"),  # a missing barrier
        ("tsan", 18, "data race"),  # a ballot taken for a barrier
        ("tsan", 19, "data race"),  # two blocks, one place
        ("tsan", 21, "data race"),
    ],
)
def test_errors_that_a_sanitizer_finds(sanitizer, kernel, words):
    status, output = run(build.program("selftest", sanitizer), str(kernel))
    assert status != 0
    assert words in output
