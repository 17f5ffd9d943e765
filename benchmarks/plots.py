"""The plot of the speed table, and the look that every plot of this project shares."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.cases import COMPILED, FOREACH, NAIVE, OURS

INK, MUTED, ACCENT, CONTROL, SECOND = "#1f2933", "#9aa5b1", "#0b7285", "#d9480f", "#74b8c4"
CONTENDERS = {NAIVE: (ACCENT, "naive eager code"), COMPILED: (SECOND, "torch.compile of it"),
              FOREACH: (MUTED, "torch._foreach_lerp_")}  # fmt: skip


def style() -> AbstractContextManager[None]:
    """Few lines, one grid, titles at the left."""
    return plt.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlepad": 10,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": "#e4e7eb",
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.bottom": False,
            "ytick.left": False,
            "text.color": INK,
            "legend.frameon": False,
        }
    )


def plot_speed(results: dict[str, Any], directory: Path) -> Path:
    """Times faster than each contender (log axis, 1 = a tie), and the share of the memory roofline."""
    cases = results["cases"]
    rivals = [name for name in CONTENDERS if any("median_s" in c["providers"].get(name, {}) for c in cases)]
    environment = results["environment"]
    with style():
        size = (11, 0.42 * len(cases) + 1.9)
        figure, (speedups, roofline) = plt.subplots(
            1, 2, figsize=size, width_ratios=(3, 1.6), sharey=True, layout="constrained"
        )
        figure.get_layout_engine().set(wspace=0.05)
        for axis in (speedups, roofline):
            axis.grid(axis="y", visible=False)
            axis.grid(axis="x", visible=True)
        for row, case in enumerate(cases):
            _speedup_bars(speedups, row, case)
            _roofline_bar(roofline, row, case["providers"][OURS])
        speedups.set_xscale("log")
        speedups.axvline(1, color=CONTROL, linewidth=1.2)
        low, high = speedups.get_xlim()
        low, high = min(low, 0.7), max(high, 3.0)
        margin = (high / low) ** 0.1  # room for the figures beside the bars
        low, high = low / margin, high * margin
        speedups.set_xlim(low, high)
        steps = (0.5, 1, 2, 5, 10, 20, 50, 100) if high / low < 300 else (0.01, 0.1, 1, 10, 100, 1000)
        ticks = [t for t in steps if low <= t <= high]
        speedups.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        speedups.minorticks_off()
        speedups.set_yticks(range(len(cases)), [case["title"] for case in cases])
        speedups.set_ylim(len(cases) - 0.4, -0.6)
        speedups.set_title("Times faster than ... (the red line is a tie)", loc="left")
        handles = [Patch(color=CONTENDERS[name][0]) for name in rivals]
        names = [CONTENDERS[name][1] for name in rivals]
        speedups.legend(
            handles, names, loc="upper left", bbox_to_anchor=(-0.02, -0.05), ncols=3, columnspacing=1.5
        )
        roofline.axvline(100, color=INK, linewidth=1, zorder=2)
        roofline.set_xlim(0, max(118.0, roofline.get_xlim()[1] * 1.1))
        roofline.set_xlabel("% of torch.add (kd) or lerp_ (others)")
        roofline.set_title("Share of the memory roofline", loc="left")
        figure.supxlabel(
            f"{environment['cpu']}, SIMD {environment['simd']}, {environment['threads']} threads, fp32, "
            f"torch {environment['torch']}, commit {environment['commit']}, other processes on "
            f"{environment['cores_busy_with_others']:.1f} cores; GPU: {environment['gpu']}",
            fontsize=8, color=MUTED, x=0.01, ha="left",
        )  # fmt: skip
        path = directory / "speed.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _roofline_bar(axis: Any, row: int, ours: dict[str, Any]) -> None:
    """The share of the roofline, or that there is none."""
    if "of_roofline" not in ours:
        axis.text(2, row, "not bound by memory", va="center", fontsize=9, color=MUTED)
        return
    share = 100 * ours["of_roofline"]
    axis.barh(row, share, height=0.5, color=MUTED, zorder=3)
    x, side, colour = (share - 2, "right", "white") if share > 25 else (share + 2, "left", INK)
    axis.text(x, row, f"{share:.0f}%", va="center", ha=side, fontsize=9, color=colour, zorder=4)


def _speedup_bars(axis: Any, row: int, case: dict[str, Any]) -> None:
    """One thin bar per contender that this case has a time for, side by side around the row."""
    ours = case["providers"][OURS]
    present = [name for name in CONTENDERS if "median_s" in case["providers"].get(name, {})]
    if "median_s" not in ours:
        axis.text(1.05, row, "no time: wrong or did not run", va="center", color=CONTROL)
        return
    height = 0.76 / max(len(present), 2)
    for place, name in enumerate(present):
        times = case["providers"][name]["median_s"] / ours["median_s"]
        y = row + height * (place - (len(present) - 1) / 2)
        axis.barh(y, times - 1, left=1, height=0.88 * height, color=CONTENDERS[name][0])
        side = "left" if times >= 1 else "right"
        axis.text(
            times * (1.04 if times >= 1 else 0.96), y, f"{times:.3g}x", va="center", ha=side, fontsize=9
        )
