"""The kernels of csrc/cuda on the CPU as standalone programs: plain, under AddressSanitizer and UBSan, under TSan."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.simt import build

CASES = [
    (name, sanitizer)
    for name in build.names()
    for sanitizer in build.SANITIZERS
    # The programs of the single paths cover the kernels of cases_kd, and compile in half the time. What a plain
    # program sees, the one under AddressSanitizer sees too: cases_kd is there for the compiler's other choices.
    if name != "selftest" and (name == "cases_kd") == (sanitizer == "plain")
]
pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=str(build.why_not()))


def run(name: str, sanitizer: str, *arguments: str) -> tuple[int, str]:
    program = build.ROOT / build.Programs().path(name, sanitizer)
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(request):
    """What the chosen tests need, compiled at once; and the cases, two at a time, as (name, sanitizer) -> future."""
    chosen = [item.callspec.params for item in request.session.items if item.module is request.module]
    wanted = sorted({(params.get("name", "selftest"), params["sanitizer"]) for params in chosen})
    build.Programs().build(wanted)
    with ThreadPoolExecutor(2) as pool:
        yield {key: pool.submit(run, *key) for key in wanted if key in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name, sanitizer", CASES)
def test_every_path_of_the_kernels(name, sanitizer, built):
    """Buffers of exact size; results against double; threads and blocks from the first and from the last."""
    status, output = built[name, sanitizer].result()
    assert status == 0, output[-4000:]
    assert "checks, 0 failures" in output


@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_the_harness_finds_what_it_says(sanitizer, built):
    status, output = run("selftest", sanitizer)
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
def test_errors_that_a_sanitizer_finds(sanitizer, kernel, words, built):
    status, output = run("selftest", sanitizer, str(kernel))
    assert status != 0
    assert words in output
