"""How things are timed here: correctness first, then providers interleaved round by round in one process.

A *case* is one problem of one size. Its *providers* are ways to compute the same thing. Each provider is first
checked against float64; one that is wrong, or does not run, gets no time. Then, after warm-up rounds, every
round calls each provider once (or `calls_per_round` times for cases of microseconds) in an order shuffled anew,
so that a slow spell of the machine hits all alike and none always follows the same neighbour. Reported are the
median and the quartiles.

A *roofline* of a case is a plain torch call with the same mix of reads and writes and the same allocation, timed
as one more provider in the same rounds: its GB/s is what this machine gives today. What a provider reaches of it
is the case's floor bytes / the provider's time / that GB/s.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.machine import OtherLoad
from benchmarks.memory import peak_bytes

WARM_UPS = 3
FEWEST_ROUNDS = 8  # taken whatever the time limit says

# Norm-wise relative errors above which a result is wrong: of ours, of others. In float32 a wrong formula is off by
# far more than eager torch rounds (the most: 6e-5, the value of torch._foreach_powsum over ResNet-18).
# In bfloat16 one rounding of the result is 2e-3, and eager torch, which rounds every intermediate, is off by some
# percent. What fasttransfer promises is tighter and the business of the tests;
# the error itself is in the results.
TOLERANCES = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 1e-1)}

Loop = Callable[[Callable[[], None], int], object]


@dataclass(frozen=True)
class Provider:
    """One way to compute a case. Only `call` is timed; `prepare` makes its argument anew every time."""

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[], Any]
    outputs: Callable[[Any, Any], Sequence[Tensor]]  # (argument, returned value) -> tensors to compare
    ours: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # threads, backend, SIMD level: not timed
    roofline: str = ""  # the name of the one it is judged by; empty: the first of the case


@dataclass(frozen=True)
class Roofline:
    """A plain torch call that moves this many bytes."""

    provider: Provider
    bytes: int


@dataclass(frozen=True)
class Case:
    """One problem of one size, with every way to compute it and how far from float64 a result is."""

    key: str
    title: str
    operation: str
    floor_bytes: int  # each input read once, each output written once
    providers: list[Provider]
    error: Callable[[str, Sequence[Tensor]], float]  # (provider's name, its outputs) -> relative error
    rooflines: list[Roofline]
    dtype: str = "fp32"
    calls_per_round: int = 1
    memory_bound: bool = True  # calls of microseconds are not, and have no share of the roofline
    about: dict[str, Any] = field(default_factory=dict)


def verdict(case: Case, provider: Provider) -> dict[str, Any]:
    """Run a provider once and compare with float64: `{"ok", "ran", "error", "note"}`."""
    own, others = TOLERANCES[case.dtype]
    tolerance = own if provider.ours else others
    try:
        with provider.around():
            argument = provider.prepare()
            start = time.perf_counter()
            returned = provider.call(argument)
            first_call = time.perf_counter() - start  # for torch.compile: what compiling costs
            error = case.error(provider.name, provider.outputs(argument, returned))
            del argument, returned
    except Exception as problem:
        # A provider that cannot run here (torch.compile without a C++ compiler) is a row that says so.
        note = f"{type(problem).__name__}: {problem}".strip().partition("\n")[0][:200]
        return {"ours": provider.ours, "ok": False, "ran": False, "error": None, "note": note}
    ok = error <= tolerance
    note = "" if ok else f"relative error {error:.1e} against float64 is above {tolerance:.0e}"
    if not math.isfinite(error):
        note = "not the right shape, or NaN, or infinite"
    return {
        "ours": provider.ours,
        "ok": ok,
        "ran": True,
        "error": error if math.isfinite(error) else None,
        "note": note,
        "first_call_s": first_call,
    }


def measure(
    case: Case,
    rounds: int,
    seconds: float = float("inf"),
    step: Callable[[str], None] = lambda _: None,
    loop: Loop | None = None,
) -> dict[str, Any]:
    """Verdicts, then interleaved times of one case, as a dict for JSON; `step` hears what happens next.

    On a slow machine there are fewer than `rounds`, so that they take about `seconds`. `loop` calls a round as many
    times as it is told: pytest-benchmark's, or a plain one.
    """
    results: dict[str, dict[str, Any]] = {}
    for provider in case.providers:
        step(f"{case.title}: {provider.name} against float64")
        results[provider.name] = verdict(case, provider)
    racing = [p for p in case.providers if results[p.name]["ok"]]
    for provider in racing:
        results[provider.name]["peak_bytes"] = peak_of(provider)
    step(f"{case.title}: timing")
    race = Race([*racing, *(r.provider for r in case.rooflines)], case.calls_per_round)
    with no_collection():
        rounds = race.warm_up(rounds, seconds)
        others = OtherLoad()
        (loop or plain_loop)(race.round, rounds)
    timing_s, others_s = others.since()
    rooflines = {}
    for roofline in case.rooflines:
        result = summary(race.samples[roofline.provider.name])
        rooflines[roofline.provider.name] = result | {"gb_per_s": gb_per_s(roofline.bytes, result)}
    for provider in racing:
        result = results[provider.name]
        result |= summary(race.samples[provider.name])
        result["gb_per_s"] = gb_per_s(case.floor_bytes, result)
        if case.memory_bound and case.rooflines:
            judge = provider.roofline or case.rooflines[0].provider.name
            result["roofline"] = judge
            result["of_roofline"] = result["gb_per_s"] / rooflines[judge]["gb_per_s"]
        results[provider.name] = result
    return {
        "key": case.key,
        "title": case.title,
        "operation": case.operation,
        "about": case.about,
        "dtype": case.dtype,
        "floor_bytes": case.floor_bytes,
        "rounds": rounds,
        "calls_per_round": case.calls_per_round,
        "timing_s": timing_s,
        "others_s": others_s,
        "providers": results,
        "rooflines": rooflines,
    }


def gb_per_s(count: int, result: dict[str, Any]) -> float:
    """Bytes over the median, in 1e9 bytes per second."""
    return count / result["median_s"] / 1e9


def peak_of(provider: Provider) -> int | None:
    """The most memory that one call held beyond what was there before it."""
    with provider.around():
        argument = provider.prepare()
        return peak_bytes(lambda: provider.call(argument))


def plain_loop(call: Callable[[], None], times: int) -> None:
    """What pytest-benchmark does in the suite."""
    for _ in range(times):
        call()


@contextmanager
def no_collection() -> Iterator[None]:
    """As timeit does: a garbage collection would be charged to whoever is being timed."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class Race:
    """Providers timed side by side: `round` calls each of them and keeps the seconds of every call."""

    def __init__(self, providers: Sequence[Provider], calls_per_round: int) -> None:
        self.samples: dict[str, list[float]] = {p.name: [] for p in providers}
        if len(self.samples) != len(providers):
            raise ValueError(f"two providers of one name: {[p.name for p in providers]}")
        self._order = list(providers)
        self._calls = calls_per_round
        self._shuffled = random.Random(0)

    def round(self) -> None:
        """One call (or `calls_per_round`) of everybody, in a new order."""
        self._shuffled.shuffle(self._order)
        for provider in self._order:
            with provider.around():
                for _ in range(self._calls):
                    self.samples[provider.name].append(time_once(provider))

    def warm_up(self, rounds: int, seconds: float) -> int:
        """Rounds that do not count, and how many may follow if those are to take about `seconds`."""
        fastest = float("inf")
        for _ in range(WARM_UPS):
            start = time.perf_counter()
            self.round()
            fastest = min(fastest, time.perf_counter() - start)
        for times in self.samples.values():
            times.clear()
        return max(FEWEST_ROUNDS, min(rounds, int(min(seconds / fastest, 1e9))))


def time_once(provider: Provider) -> float:
    """Seconds of one call on a fresh argument; what it returns is freed after the clock has stopped."""
    argument = provider.prepare()
    start = time.perf_counter_ns()
    returned = provider.call(argument)
    elapsed = time.perf_counter_ns() - start
    del returned, argument
    return elapsed * 1e-9


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of a list of times in seconds, and the list."""
    times = list(times) * 2 if len(times) == 1 else times  # one call: --benchmark-disable
    quarter, median, three_quarters = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "median_s": median, "q1_s": quarter, "q3_s": three_quarters, "calls": len(times), "samples_s": list(times)
    }  # fmt: skip
