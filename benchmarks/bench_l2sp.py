"""The L2-SP penalty with its gradient: `l2sp_add_grad_` against the loop over parameters, and torch's list calls.

Run it:  pytest benchmarks/bench_l2sp.py --tag quick --benchmark-json raw.json
         python -m benchmarks report raw.json -o bench        (or both in one: make bench-quick)

The cases are in benchmarks/cases/l2sp.py, the method in benchmarks/timing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import Spec
from benchmarks.suite import Effort, bench

OPERATION = "l2sp"


def test_l2sp(spec: Spec, benchmark: Any, effort: Effort, say: Callable[[str], None]) -> None:
    bench(spec, benchmark, effort, say)
