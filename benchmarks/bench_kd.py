"""Distillation: `kd_loss` against the code people write, torch.compile of it, and peers.

Run it:  pytest benchmarks/bench_kd.py --tag quick --benchmark-json raw.json
         python -m benchmarks report raw.json -o bench        (or both in one: make bench-quick)

The cases are in benchmarks/cases/kd.py, the method in benchmarks/timing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import Spec
from benchmarks.suite import Effort, bench

OPERATION = "kd"


def test_kd(spec: Spec, benchmark: Any, effort: Effort, say: Callable[[str], None]) -> None:
    bench(spec, benchmark, effort, say)
