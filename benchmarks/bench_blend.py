"""Blending in place: `blend_` and `blend_many_` against loops, torch's list calls, its EMA class, and peers.

Run it:  pytest benchmarks/bench_blend.py --tag quick --benchmark-json raw.json
         python -m benchmarks report raw.json -o bench        (or both in one: make bench-quick)

The cases are in benchmarks/cases/blend.py, the method in benchmarks/timing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import Spec
from benchmarks.suite import Effort, bench

OPERATION = "blend"


def test_blend(spec: Spec, benchmark: Any, effort: Effort, say: Callable[[str], None]) -> None:
    bench(spec, benchmark, effort, say)
