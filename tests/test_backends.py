"""The suite's own machinery: that a test that asks for a backend runs on it."""

import pytest
import torch

import fasttransfer
from fasttransfer import kd_loss
from tests.backends import BACKENDS, LATER, SIMD_LEVELS, default_backend, running, why_not


@pytest.mark.parametrize("name", [*BACKENDS, *LATER])
def test_backend_is_present(name):
    reason = why_not(name)
    if reason:
        pytest.skip(reason)
    with running(name):
        pass


def test_every_level_that_is_built_is_tested():
    assert set(fasttransfer.build_info()["simd_levels"]) <= set(SIMD_LEVELS)


def test_backend_is_the_one_that_runs(backend):
    """Pure torch is seen in the profile as its own operators; the native kernel as none."""
    s, t = torch.randn(2, 5), torch.randn(2, 5)
    with torch.profiler.profile() as profile:
        kd_loss(s, t)
    operators = {event.name for event in profile.events()}
    assert "fasttransfer::kd" in operators
    assert ("aten::exp" in operators) == (backend == "reference")
    if backend.startswith("cpu-"):
        assert fasttransfer.build_info()["simd_level"] == backend.removeprefix("cpu-")


def test_backend_is_restored(backend):
    before = fasttransfer.build_info()["simd_level"]
    other = "reference" if backend != "reference" else default_backend()
    with running(other):
        pass
    assert fasttransfer.build_info()["simd_level"] == before


def test_threads_are_the_ones_asked_for(threads):
    assert torch.get_num_threads() == threads
