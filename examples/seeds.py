"""Figures over seeds: mean, spread, and differences paired by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def mean_and_spread(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Mean, sample standard deviation (0 for one seed) and the values themselves."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread, "values": list(values)}


def paired(values: Sequence[float], control: Sequence[float]) -> dict[str, float | int]:
    """Seed by seed against a control: mean difference, its standard deviation, and wins, ties and losses."""
    differences = [value - base for value, base in zip(values, control, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return {
        "difference": statistics.fmean(differences),
        "std": spread,
        "wins": sum(d > 0 for d in differences),
        "ties": sum(d == 0 for d in differences),
        "of": len(differences),
    }
