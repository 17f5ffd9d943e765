"""Experiments over seeds: run them, and say what came out as mean, spread and differences paired by seed."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from typing import Any, TypeVar

import torch

from examples.parts import Reporter

Result = TypeVar("Result")
SEEDS = {"full": range(8), "quick": range(2)}


def seeds(quick: bool) -> range:
    """The seeds of a run: 8, or 2 in the short form."""
    return SEEDS["quick" if quick else "full"]


@cache
def _processes() -> ProcessPoolExecutor:
    # Models this small gain nothing from a second thread and lose much to it on a busy machine; seeds side by side do.
    return ProcessPoolExecutor(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        mp_context=multiprocessing.get_context("spawn"),  # a fork would inherit the locks of torch's threads
        initializer=torch.set_num_threads,
        initargs=(1,),
    )


def over_seeds(run_seed: Callable[[int], Result], chosen: Sequence[int], reporter: Reporter) -> list[Result]:
    """`run_seed` of each seed, in order, one seed per core at a time; the reporter advances once per seed."""
    reporter.say(f"{len(chosen)} seeds, one per core")
    running = [_processes().submit(run_seed, seed) for seed in chosen]
    for done in as_completed(running):
        done.result()  # the first failure ends the run
        reporter.advance()
    return [done.result() for done in running]


def mean_and_spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Mean, sample standard deviation (0 for one seed) and the values themselves."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}


def paired(values: Sequence[float], control: Sequence[float]) -> dict[str, float | int]:
    """Seed by seed against a control: mean difference, its standard deviation, and wins and ties of n."""
    differences = [value - base for value, base in zip(values, control, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return {
        "difference": statistics.fmean(differences),
        "std": spread,
        "wins": sum(d > 0 for d in differences),
        "ties": sum(d == 0 for d in differences),
        "of": len(differences),
    }


def summary(
    by_seed: Sequence[Mapping[str, Mapping[str, float]]], metric: str, baselines: Sequence[str]
) -> dict[str, Any]:
    """Per method: mean and spread of each of its figures, and `metric` paired against each baseline."""
    methods: dict[str, Any] = {}
    for name, first in by_seed[0].items():
        methods[name] = {key: mean_and_spread([seed[name][key] for seed in by_seed]) for key in first}
        own = [seed[name][metric] for seed in by_seed]
        methods[name]["against"] = {
            base: paired(own, [seed[base][metric] for seed in by_seed]) for base in baselines if base != name
        }
    return methods


def mean_of(methods: Mapping[str, Any], name: str, figure: str) -> float:
    """The mean over seeds of one figure of one method."""
    return methods[name][figure]["mean"]


def points(methods: Mapping[str, Any], name: str, baseline: str) -> str:
    """What a method gained on a baseline, for a sentence: `+12.0 points, 8 of 8 seeds`."""
    found = methods[name]["against"][baseline]
    return f"{100 * found['difference']:+.1f} points, {found['wins']} of {found['of']} seeds"


def verdict(comparison: Mapping[str, Any]) -> str:
    """`helps` or `hurts` where at least 7 of 8 seeds say so, else `unclear`; `no change` where all are tied.

    Fewer than 7 seeds have no verdict: two that agree do so by chance every other time.
    """
    needed = math.ceil(7 / 8 * comparison["of"])
    losses = comparison["of"] - comparison["wins"] - comparison["ties"]
    if comparison["ties"] == comparison["of"]:
        return "no change"
    if comparison["of"] < 7:
        return "few seeds"
    if comparison["wins"] >= needed:
        return "helps"
    return "hurts" if losses >= needed else "unclear"
