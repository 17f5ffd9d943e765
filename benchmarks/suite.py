"""How a case becomes a test of pytest-benchmark: what is timed is one interleaved round over all providers.

pytest-benchmark's own figures are then those of whole rounds; everything about the providers is in `extra_info`.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.cases.common import KINDS, Spec
from benchmarks.results import failures_of
from benchmarks.timing import measure


@dataclass(frozen=True)
class Effort:
    """How long each case is measured, and against whom."""

    rounds: int
    seconds: float
    kinds: frozenset[str]


EFFORTS = {
    "full": Effort(60, 5.0, KINDS),
    "quick": Effort(20, 1.5, KINDS - {"compile"}),
    "smoke": Effort(8, 0.4, KINDS - {"compile"}),
    "demo": Effort(40, 2.5, frozenset({"naive", "compile", "torch"})),
}


def kinds_for(spec: Spec, kinds: frozenset[str]) -> frozenset[str]:
    """torch.compile only where a case is marked for it; in a scan over sizes only the naive code beside ours."""
    if spec.about.get("group") == "scan":
        return kinds & {"naive"}
    return kinds if spec.compiled else kinds - {"compile"}


def bench(spec: Spec, benchmark: Any, effort: Effort, say: Callable[[str], None]) -> None:
    """Measure one case; a wrong result of ours fails the test, a time never does."""
    quieten_inductor()
    say(f"{spec.title}: making tensors")

    def loop(call: Callable[[], None], rounds: int) -> None:
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=0)

    case = spec.build(kinds_for(spec, effort.kinds))
    benchmark.extra_info.update(measure(case, effort.rounds, effort.seconds, say, loop))
    del case
    torch._dynamo.reset()  # compile once per case: nothing is carried over to the next
    gc.collect()  # some cases need most of the memory
    wrong = failures_of(benchmark.extra_info)
    if wrong:
        pytest.fail("wrong:\n" + "\n".join(wrong), pytrace=False)


def quieten_inductor() -> None:
    """Keep compiler chatter out of the progress display; a failure to compile is a note in the results."""
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo).*")
    for name in ("torch._inductor", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)
