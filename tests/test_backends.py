"""The suite's own machinery: that a test that asks for a backend runs on it."""

import os
import subprocess
import sys

import pytest
import torch

import fasttransfer
from fasttransfer import kd_loss
from tests.backends import BACKENDS, SIMD_LEVELS, default_backend, running, why_not


@pytest.mark.parametrize("name", BACKENDS)
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


# ------------------------------------------------------------------------------------------------ the environment


def imported(**variables):
    """The package imported by another Python with these variables: (exit status, what it printed)."""
    code = "import fasttransfer as f; i = f.build_info(); print(i['cpu_kernels'], i['simd_level'], i['cpu_reason']); "
    code += "import sys; print('with Dynamo' if 'torch._dynamo' in sys.modules else 'without Dynamo')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTTRANSFER_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_backend_variable_can_take_the_native_kernels_away():
    status, output = imported(FASTTRANSFER_BACKEND="reference")
    assert status == 0
    assert "False None FASTTRANSFER_BACKEND=reference" in output
    assert "without Dynamo" in output  # which takes as long to import as torch itself


def test_simd_variable_chooses_a_level():
    levels = fasttransfer.build_info()["simd_levels"]
    if not levels:
        pytest.skip(why_not("cpu-baseline"))
    status, output = imported(FASTTRANSFER_SIMD=levels[-1])
    assert (status, output.split()[:2]) == (0, ["True", levels[-1]])


@pytest.mark.parametrize("variable", ["FASTTRANSFER_BACKEND", "FASTTRANSFER_SIMD"])
def test_junk_in_a_variable_is_an_error_that_names_it(variable):
    if variable == "FASTTRANSFER_SIMD" and why_not("cpu-baseline"):
        pytest.skip(why_not("cpu-baseline"))
    status, output = imported(**{variable: "junk"})
    assert status != 0
    assert f"ValueError: {variable} must be one of" in output
    assert "'junk'" in output


def test_unknown_backends_and_levels_are_errors():
    with (
        pytest.raises(ValueError, match="backend must be one of auto, reference, native"),
        fasttransfer.use_backend("x"),
    ):
        pass
    if not fasttransfer.build_info()["cpu_kernels"]:
        with pytest.raises(RuntimeError, match="no native kernels"), fasttransfer.simd_level("baseline"):
            pass
        return
    with pytest.raises(ValueError, match="level must be one of"), fasttransfer.simd_level("avx1024"):
        pass


def test_backends_nest():
    if why_not("cpu-baseline"):
        pytest.skip(why_not("cpu-baseline"))

    def runs_pure_torch():
        with torch.profiler.profile() as profile:
            kd_loss(torch.randn(2, 5), torch.randn(2, 5))
        return "aten::exp" in {event.name for event in profile.events()}

    with fasttransfer.use_backend("reference"):
        assert runs_pure_torch()
        with fasttransfer.use_backend("native"):
            assert not runs_pure_torch()
        assert runs_pure_torch()
    assert not runs_pure_torch()
