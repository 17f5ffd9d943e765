"""How things are timed here: correctness first, then providers interleaved round by round in one process.

A *case* is one problem of one size. Its *providers* are ways to compute the same thing. Each provider is first
checked against float64; one that is wrong, or does not run, gets no time. Then, after three warm-up rounds,
every round calls each provider once (or `calls_per_round` times for cases of microseconds) in an order shuffled
anew, so that a slow spell of the machine hits all alike and none always follows the same neighbour. Reported
are the median and the quartiles.

The *roofline* of a case is a plain torch call with the same mix of reads and writes and the same allocation,
timed as one more provider in the same rounds: its GB/s is what this machine gives today.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.machine import OtherLoad
from benchmarks.oracle import relative_error

WARM_UPS = 3
FEWEST_ROUNDS = 8  # taken whatever the time limit says
# A wrong formula is off by far more, float32 rounding in eager torch by less. The accuracy that fasttransfer
# promises is tighter and is the business of the tests; the error itself is in the results.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. Only `call` is timed; `prepare` makes its argument anew every time."""

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[], Any]
    outputs: Callable[[Any, Any], Sequence[Tensor]]  # (argument, returned value) -> tensors to compare


@dataclass(frozen=True)
class Case:
    """One problem of one size, with every way to compute it and the float64 answer."""

    key: str
    title: str
    operation: str
    floor_bytes: int  # each input read once, each output written once
    providers: list[Provider]
    exact: dict[str, list[Tensor]] | list[Tensor]  # one answer for all, or one per provider name
    roofline: Provider
    roofline_bytes: int
    calls_per_round: int = 1


def verdict(case: Case, provider: Provider) -> dict[str, Any]:
    """Run a provider once and compare with float64: `{"ok", "ran", "error", "note"}`."""
    exact = case.exact[provider.name] if isinstance(case.exact, dict) else case.exact
    try:
        argument = provider.prepare()
        start = time.perf_counter()
        returned = provider.call(argument)
        first_call = time.perf_counter() - start  # for torch.compile: what compiling costs
        error = relative_error(provider.outputs(argument, returned), exact)
    except Exception as problem:
        # A provider that cannot run here (torch.compile without a C++ compiler) is a row that says so.
        note = f"{type(problem).__name__}: {problem}".strip().partition("\n")[0][:200]
        return {"ok": False, "ran": False, "error": None, "note": note}
    ok = error <= TOLERANCE
    note = "" if ok else f"relative error {error:.1e} against float64 is above {TOLERANCE:.0e}"
    if not math.isfinite(error):
        note = "not the right shape, or NaN, or infinite"
    return {
        "ok": ok,
        "ran": True,
        "error": error if math.isfinite(error) else None,
        "note": note,
        "first_call_s": first_call,
    }


def measure(
    case: Case, rounds: int, seconds: float = float("inf"), step: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Verdicts, then interleaved times of one case, as a dict for JSON; `step` hears what happens next.

    On a slow or busy machine the timing ends before `rounds` are through, when `seconds` are over.
    """
    results: dict[str, dict[str, Any]] = {}
    for provider in case.providers:
        step(f"{case.title}: {provider.name} against float64")
        results[provider.name] = verdict(case, provider)
    racing = [p for p in case.providers if results[p.name]["ok"]] + [case.roofline]
    step(f"{case.title}: timing")
    others = OtherLoad()
    samples = interleave(racing, rounds, case.calls_per_round, seconds)
    timing_s, others_s = others.since()
    for name, times in samples.items():
        results.setdefault(name, {}).update(summary(times))
    roofline = results.pop(case.roofline.name)
    roofline["gb_per_s"] = case.roofline_bytes / roofline["median_s"] / 1e9
    roofline["call"] = case.roofline.name
    for result in results.values():
        if "median_s" in result:
            result["gb_per_s"] = case.floor_bytes / result["median_s"] / 1e9
            if case.calls_per_round == 1:  # calls of microseconds are not bound by memory
                result["of_roofline"] = result["gb_per_s"] / roofline["gb_per_s"]
    return {
        "key": case.key,
        "title": case.title,
        "operation": case.operation,
        "floor_bytes": case.floor_bytes,
        "rounds": len(samples[case.roofline.name]) // case.calls_per_round,
        "calls_per_round": case.calls_per_round,
        "timing_s": timing_s,
        "others_s": others_s,
        "providers": results,
        "roofline": roofline,
    }


def interleave(
    providers: Sequence[Provider], rounds: int, calls_per_round: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every call of every provider, after the warm-up rounds."""
    deadline = time.monotonic() + seconds
    samples: dict[str, list[float]] = {p.name: [] for p in providers}
    shuffled = random.Random(0)
    order = list(providers)
    collecting = gc.isenabled()
    gc.disable()  # as timeit does: a collection would be charged to whoever is being timed
    try:
        for round_number in range(WARM_UPS + rounds):
            if round_number >= WARM_UPS + FEWEST_ROUNDS and time.monotonic() > deadline:
                break
            shuffled.shuffle(order)
            for provider in order:
                for _ in range(calls_per_round):
                    elapsed = time_once(provider)
                    if round_number >= WARM_UPS:
                        samples[provider.name].append(elapsed)
    finally:
        if collecting:
            gc.enable()
    return samples


def time_once(provider: Provider) -> float:
    """Seconds of one call on a fresh argument; what it returns is freed after the clock has stopped."""
    argument = provider.prepare()
    start = time.perf_counter_ns()
    returned = provider.call(argument)
    elapsed = time.perf_counter_ns() - start
    del returned, argument
    return elapsed * 1e-9


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of a list of times in seconds."""
    quarter, median, three_quarters = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_s": median, "q1_s": quarter, "q3_s": three_quarters, "calls": len(times)}
