"""What `make gpu` runs, as far as it goes without a GPU: its calls, its benchmarks on the CPU with small problems."""

from __future__ import annotations

import sys
import time
from functools import partial

import pytest
import torch

from benchmarks import gpu as bench
from benchmarks import naive, results
from build_tools import gpu, gpu_calls


class Event:
    """A CUDA event on the CPU's clock."""

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1)


SMALL = [(64, 33), (7,), (129,)]
PROBLEMS = {
    "kd": partial(bench.Kd, 1030, 130, "bf16"),  # more rows than one piece of random numbers
    "l2sp": partial(bench.L2sp, SMALL),
    "blend": partial(bench.Blend, SMALL, 0.999, 1, "fp32", naive.ema),
    "blend_many": partial(bench.Blend, SMALL, 0.4, 4, "fp32", naive.blend_many),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_benchmark_becomes_a_result(name, cpu_as_gpu, tmp_path):
    case = bench.build(bench.GpuCase(name, name, name, PROBLEMS[name], 0.0), compiling=False)
    measured = bench.measure(case, 0.01)
    assert {"naive", "fasttransfer"} <= set(measured["providers"])
    assert results.failures_of(measured) == []
    result = results.result_of([measured], "gpu", bench.environment(), {})
    results.save(result, tmp_path / "gpu.json")  # which checks it
    assert "fasttransfer" in bench.table(result)


def test_the_cases_are_larger_than_any_cache():
    for case in bench.cases():
        assert case.gigabytes > 4


def test_the_calls_for_the_sanitizer(monkeypatch):
    monkeypatch.setattr(gpu_calls, "VOCABULARIES", (3, 1025))
    assert gpu_calls.main("cpu") == 0


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"make gpu: torch .* finds no GPU: nothing was run") as stopped:
        gpu.main([])
    assert "\n" not in str(stopped.value)


def test_a_step_that_takes_too_long_is_ended(capsys):
    assert gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], most=0.5) == 124
    assert "out of time" in capsys.readouterr().out
