"""Fixtures of the whole suite: `backend`, `threads`, and the same random numbers in every run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

import fasttransfer
from tests.backends import BACKENDS, default_backend, running, why_not

# The same examples in every run, and no deadline: a shared CI machine may stall for a second. All examples of a test
# run on its one `backend`, as they should.
settings.register_profile(
    "fasttransfer",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fasttransfer")


# Tests are small: one thread unless a test asks for `threads`. On a busy machine of two cores, threads that wait for
# each other make the suite ten times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The test runs once per backend: pure torch, each SIMD level, the CUDA kernels on the CPU, a GPU. Its name."""
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    with running(request.param):
        yield request.param


@pytest.fixture
def one_backend():
    """The backend that users of this machine get, for tests of torch's machinery (compile, opcheck): once each."""
    with running(default_backend()):
        yield default_backend()


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}threads")
def threads(request):
    """The number of threads of torch's CPU pool, restored afterwards. Two also where there is only one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_report_header():
    info = fasttransfer.build_info()
    reasons = {name: why_not(name) for name in BACKENDS}
    present = ", ".join(name for name, reason in reasons.items() if not reason)
    return [
        f"fasttransfer {info['version']}, torch {info['torch']}, {os.cpu_count()} cores, backends: {present}",
        *(f"backend {name} is absent: {reason}" for name, reason in reasons.items() if reason),
    ]
