"""The benchmarks on a GPU: `python -m benchmarks.gpu`, which `make gpu` runs after building and testing.

The same problems, verdicts and figures as on the CPU (`cases/`, `timing.py`), with the tensors on the device and CUDA
events for a clock. Every case moves more than the L2 cache holds, so nothing needs flushing; the CPU runs ahead of the
GPU, as it does in training. The result goes to results/<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, peers, shapes
from benchmarks.cases import blend, kd_problem, l2sp
from benchmarks.cases.common import COMPILED, DTYPES
from benchmarks.cases.problem import Problem
from benchmarks.machine import environment
from benchmarks.results import COMMITTED, failures, result_of, save
from benchmarks.suite import quieten_inductor
from benchmarks.timing import Case, Provider, Roofline, gb_per_s, summary, verdict

DEVICE = "cuda"
WARM_UPS, FEWEST, MOST = 3, 10, 100


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().to(DEVICE) for t in tensors]


def lerp(count: int) -> Roofline:
    """`a.lerp_(b, w)` over one flat tensor: as the CPU's, on the device."""
    a, b = (torch.randn(count, device=DEVICE) for _ in range(2))
    call = Provider("a.lerp_(b, w)", lambda x: x.lerp_(b, 0.1), lambda: a, lambda _, out: [out])
    return Roofline(call, 3 * 4 * count)


class Kd(kd_problem.Problem):
    """Distillation, its logits made on the device."""

    def _logits(self, seed: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        made = torch.empty(self.rows, self.vocab, device=DEVICE, dtype=DTYPES[self.dtype])
        for part in made.split(1024):
            part.copy_(torch.randn(part.shape, generator=generator, device=DEVICE).mul_(3.0))
        return made


class L2sp(l2sp.Problem):
    """L2-SP over the parameters of a model on the device."""

    def __init__(self, of: shapes.Shapes) -> None:
        super().__init__(of)
        self.params = [p.requires_grad_(True) for p in on_gpu(self.params)]
        self.start = on_gpu(self.start)
        for p in self.params:
            p.grad = torch.empty_like(p)

    def roofline(self, suffix: str = "", **more: Any) -> Roofline:
        return lerp(self.numbers)


class Blend(blend.Problem):
    """Blending the parameters of models on the device."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.original, self.target = on_gpu(self.original), on_gpu(self.target)
        self.sources = [on_gpu(source) for source in self.sources]

    def roofline(self, suffix: str = "", **more: Any) -> Roofline:
        return lerp(self.numbers)


@dataclass(frozen=True)
class GpuCase:
    key: str
    title: str
    operation: str
    problem: Callable[[], Problem]
    gigabytes: float  # of device memory, everybody's temporaries included
    compiled: bool = True


def cases() -> list[GpuCase]:
    gpt2 = shapes.gpt2()
    ema = partial(Blend, gpt2, 0.999, 1, "fp32", naive.ema)
    soup = partial(Blend, gpt2, 0.4, 4, "fp32", naive.blend_many)
    return [
        GpuCase("kd_8192x128256_bf16", "kd 8192x128256 bf16", "kd", partial(Kd, 8192, 128256, "bf16"), 30.0),
        GpuCase("kd_16384x32000_bf16", "kd 16384x32000 bf16", "kd", partial(Kd, 16384, 32000, "bf16"), 16.0),
        GpuCase("l2sp_GPT-2", "l2sp_add_grad_ GPT-2", "l2sp", partial(L2sp, gpt2), 6.0),
        GpuCase("blend_EMA_GPT-2", "blend_ EMA GPT-2", "blend", ema, 6.0),
        # torch.compile over the list is raced once, in the EMA: it takes a minute.
        GpuCase("blend_many_x4_GPT-2", "blend_many_ x4 GPT-2", "blend", soup, 8.0, compiled=False),
    ]


def build(which: GpuCase, compiling: bool) -> Case:
    """Naive, torch.compile at its best, torch's own calls, other libraries, ours."""
    problem = which.problem()
    providers = problem.naive_if(frozenset({"naive"}))
    if which.compiled and compiling:
        # Without CUDA graphs, which would copy the logits into memory of their own at each call.
        tuned = torch.compile(problem.naive, mode="max-autotune-no-cudagraphs", dynamic=False)
        providers.append(problem.provider(f"{COMPILED} max-autotune", problem.by_hand(tuned)))
    providers += problem.others(frozenset({"torch", "peers"}))
    return Case(
        key=which.key,
        title=which.title,
        operation=which.operation,
        floor_bytes=problem.floor_bytes,
        providers=[*providers, problem.our_own()],
        error=lambda _, outputs: problem.error(outputs),
        rooflines=[problem.roofline()],
        dtype=problem.dtype,
        about={"group": "gpu", "dtype": problem.dtype, "numbers": problem.numbers},
    )


def race(providers: list[Provider], seconds: float) -> dict[str, list[float]]:
    """Seconds of every call by provider, all called once per round, in a new order."""
    samples: dict[str, list[float]] = {p.name: [] for p in providers}
    order, shuffled = list(providers), random.Random(0)

    def once() -> None:
        shuffled.shuffle(order)
        clocks = []
        for provider in order:
            argument = provider.prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            returned = provider.call(argument)
            end.record()
            clocks.append((provider.name, start, end))
            del argument, returned
        torch.cuda.synchronize()
        for name, start, end in clocks:
            samples[name].append(start.elapsed_time(end) * 1e-3)

    for _ in range(WARM_UPS):
        began = time.perf_counter()
        once()
        took = time.perf_counter() - began
    for times in samples.values():
        times.clear()
    for _ in range(max(FEWEST, min(MOST, int(seconds / took)))):
        once()
    return samples


def peak(provider: Provider) -> int:
    """The most device memory that one call held beyond what was there before it."""
    argument = provider.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = provider.call(argument)
    most = torch.cuda.max_memory_allocated() - before
    del returned
    return most


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Verdicts, then times, in the form of `timing.measure`."""
    results = {p.name: verdict(case, p) for p in case.providers}
    racing = [p for p in case.providers if results[p.name]["ok"]]
    for provider in racing:
        results[provider.name]["peak_bytes"] = peak(provider)
    began = time.perf_counter()
    samples = race([*racing, *(r.provider for r in case.rooflines)], seconds)
    rooflines = {}
    for roofline in case.rooflines:
        result = summary(samples[roofline.provider.name])
        rooflines[roofline.provider.name] = result | {"gb_per_s": gb_per_s(roofline.bytes, result)}
    judge = next(iter(rooflines))
    for provider in racing:
        result = results[provider.name]
        result |= summary(samples[provider.name])
        result["gb_per_s"] = gb_per_s(case.floor_bytes, result)
        result |= {"roofline": judge, "of_roofline": result["gb_per_s"] / rooflines[judge]["gb_per_s"]}
    return {
        "key": case.key,
        "title": case.title,
        "operation": case.operation,
        "about": case.about,
        "dtype": case.dtype,
        "floor_bytes": case.floor_bytes,
        "rounds": len(samples[judge]),
        "calls_per_round": 1,
        "timing_s": time.perf_counter() - began,
        "others_s": 0.0,
        "providers": results,
        "rooflines": rooflines,
    }


def table(result: dict[str, Any]) -> str:
    """One block per case: who, milliseconds, GB/s, share of the roofline, how much faster ours is."""
    lines = []
    for case in result["cases"]:
        (judge, roofline) = next(iter(case["rooflines"].items()))
        lines.append(f"\n{case['title']}    roofline {judge}: {roofline['gb_per_s']:.0f} GB/s")
        ours = next((p for p in case["providers"].values() if p["ours"] and p["ok"]), None)
        for name, p in case["providers"].items():
            if not p["ok"]:
                lines.append(f"  {name:32} {p['note']}")
                continue
            times = f"{p['median_s'] / ours['median_s']:6.2f}x" if ours else ""
            lines.append(
                f"  {name:32} {p['median_s'] * 1e3:9.3f} ms {p['gb_per_s']:7.0f} GB/s {p['of_roofline']:6.2f} {times}"
                f"  {p['peak_bytes'] / 1e9:6.2f} GB  error {p['error']:.0e}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds per case")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further case begins")
    parser.add_argument("-o", "--out", type=Path, default=COMMITTED, help="folder of the result")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU")
        return 1
    quieten_inductor()
    free, began, measured = torch.cuda.mem_get_info()[0] / 1e9, time.monotonic(), []
    for which in cases():
        if which.gigabytes > free or time.monotonic() - began > options.limit:
            print(
                f"{which.title}: left out, {'too little memory' if which.gigabytes > free else 'out of time'}"
            )
            continue
        case = build(which, not options.no_compile)
        measured.append(measure(case, options.seconds))
        print(table({"cases": measured[-1:]}), flush=True)
        del case
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    device = torch.cuda.get_device_properties(0)
    about = environment() | {
        "l2_bytes": device.L2_cache_size,
        "multiprocessors": device.multi_processor_count,
    }
    result = result_of(measured, "gpu", about, peers.absent())
    path = options.out / f"{re.sub('[^a-z0-9]+', '-', device.name.lower()).strip('-')}.json"
    save(result, path)
    print(f"\n{path}")
    wrong = failures(result)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
