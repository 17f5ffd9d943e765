"""The plots of the benchmarks, and the look that every plot of this project shares."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.cases.common import COMPILED, NAIVE, OURS
from benchmarks.figures import best_other, environment_line, linear_fit, plain

INK, MUTED, ACCENT, CONTROL, SECOND = "#1f2933", "#9aa5b1", "#0b7285", "#d9480f", "#74b8c4"
OTHER = "best other"
CONTENDERS = {NAIVE: (ACCENT, "naive eager code"), COMPILED: (SECOND, "torch.compile of it"),
              OTHER: (MUTED, "best other: torch's own calls, peers")}  # fmt: skip
CLIFF = 32 * 2**20  # bytes
KD, LISTS = ("forward+backward", "labels"), ("l2sp", "one", "many", "mixed")


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


def signed(figure: Any, result: dict[str, Any]) -> None:
    """The machine in small print below."""
    environment = result["environment"]
    busy = f"; other processes on {environment['cores_busy_with_others']:.1f} cores meanwhile"
    figure.supxlabel(environment_line(environment) + busy, fontsize=8, color=MUTED, x=0.01, ha="left")


def finish(figure: Any, path: Path) -> Path:
    """Write and close."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def plot_speed(result: dict[str, Any], directory: Path) -> Path | None:
    """All cases of a short result in one picture: the demo's."""
    return _plot_speed(result, plain(result["cases"], *KD, *LISTS), directory / "speed.png")


def plot_speed_kd(result: dict[str, Any], directory: Path) -> Path | None:
    """The cases of kd with backward."""
    return _plot_speed(result, plain(result["cases"], *KD), directory / "speed-kd.png")


def plot_speed_lists(result: dict[str, Any], directory: Path) -> Path | None:
    """The cases over lists of parameters: l2sp and blend."""
    return _plot_speed(result, plain(result["cases"], *LISTS), directory / "speed-lists.png")


def _plot_speed(result: dict[str, Any], cases: list[dict[str, Any]], path: Path) -> Path | None:
    """Times faster than each contender (log axis, 1 = a tie), and the share of the memory roofline."""
    if not cases:
        return None
    names = {id(case): _contenders(case) for case in cases}
    rivals = [name for name in CONTENDERS if any(name in names[id(case)] for case in cases)]
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
            _speedup_bars(speedups, row, case, names[id(case)])
            _roofline_bar(roofline, row, case["providers"][OURS])
        _speedup_axis(speedups, cases)
        handles = [Patch(color=CONTENDERS[name][0]) for name in rivals]
        labels = [CONTENDERS[name][1] for name in rivals]
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        roofline.axvline(100, color=INK, linewidth=1, zorder=2)
        roofline.set_xlim(0, max(118.0, roofline.get_xlim()[1] * 1.1))
        roofline.set_xlabel("% of torch.add (kd) or lerp_ (others)")
        roofline.set_title("Share of the memory roofline", loc="left")
        signed(figure, result)
        return finish(figure, path)


def _contenders(case: dict[str, Any]) -> dict[str, str]:
    """Which contenders have a time here, and which provider each is."""
    other = best_other(case)
    present = {name: name for name in (NAIVE, COMPILED) if "median_s" in case["providers"].get(name, {})}
    return present | ({OTHER: other} if other else {})


def _speedup_axis(axis: Any, cases: list[dict[str, Any]]) -> None:
    axis.set_xscale("log")
    axis.axvline(1, color=CONTROL, linewidth=1.2)
    low, high = axis.get_xlim()
    low, high = min(low, 0.7), max(high, 3.0)
    margin = (high / low) ** 0.1  # room for the figures beside the bars
    low, high = low / margin, high * margin
    axis.set_xlim(low, high)
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if high / low < 1000 else (0.01, 0.1, 1, 10, 100, 1000)
    ticks = [t for t in steps if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(cases)), [case["title"] for case in cases])
    axis.set_ylim(len(cases) - 0.4, -0.6)
    axis.set_title("Times faster than ... (the red line is a tie)", loc="left")


def _roofline_bar(axis: Any, row: int, ours: dict[str, Any]) -> None:
    """The share of the roofline, or that there is none."""
    if "of_roofline" not in ours:
        axis.text(2, row, "not bound by memory", va="center", fontsize=9, color=MUTED)
        return
    share = 100 * ours["of_roofline"]
    axis.barh(row, share, height=0.5, color=MUTED, zorder=3)
    x, side, colour = (share - 2, "right", "white") if share > 25 else (share + 2, "left", INK)
    axis.text(x, row, f"{share:.0f}%", va="center", ha=side, fontsize=9, color=colour, zorder=4)


def _speedup_bars(axis: Any, row: int, case: dict[str, Any], present: dict[str, str]) -> None:
    """One thin bar per contender that this case has a time for, side by side around the row."""
    ours = case["providers"][OURS]
    if "median_s" not in ours:
        axis.text(1.05, row, "no time: wrong or did not run", va="center", color=CONTROL)
        return
    height = 0.76 / max(len(present), 2)
    for place, (name, provider) in enumerate(present.items()):
        times = case["providers"][provider]["median_s"] / ours["median_s"]
        y = row + height * (place - (len(present) - 1) / 2)
        axis.barh(y, times - 1, left=1, height=0.88 * height, color=CONTENDERS[name][0])
        side = "left" if times >= 1 else "right"
        axis.text(
            times * (1.04 if times >= 1 else 0.96), y, f"{times:.3g}x", va="center", ha=side,
            fontsize=9 if len(present) < 3 else 8,
        )  # fmt: skip


def plot_roofline(result: dict[str, Any], directory: Path) -> Path | None:
    """Where each provider stands between no bandwidth and the roofline, a row per case."""
    cases = [
        c
        for c in plain(result["cases"])
        if "of_roofline" in c["providers"][OURS] and c["about"]["group"] != "scan"
    ]
    if not cases:
        return None
    looks = {OURS: (ACCENT, 70, "fasttransfer"), COMPILED: (SECOND, 45, "torch.compile"),
             OTHER: (MUTED, 45, "best other"), NAIVE: (INK, 22, "naive")}  # fmt: skip
    with style():
        figure, axis = plt.subplots(figsize=(9, 0.3 * len(cases) + 1.9), layout="constrained")
        axis.grid(axis="x", visible=True)
        for row, case in enumerate(cases):
            own = 100 * case["providers"][OURS]["of_roofline"]
            axis.plot([0, own], [row, row], color=SECOND, linewidth=1, alpha=0.5, zorder=1)
            present = {OURS: OURS} | _contenders(case)
            for name, (colour, area, _) in looks.items():
                share = case["providers"].get(present.get(name, ""), {}).get("of_roofline")
                if share is not None:
                    axis.scatter(100 * share, row, s=area, color=colour, zorder=3, linewidths=0)
            axis.text(own + 2, row, f"{own:.0f}", va="center", fontsize=8, color=ACCENT, fontweight="bold")
        axis.axvline(100, color=CONTROL, linewidth=1.2)
        axis.set_yticks(range(len(cases)), [case["title"] for case in cases])
        axis.set_ylim(len(cases) - 0.4, -0.6)
        axis.set_xlim(0, max(112.0, axis.get_xlim()[1]))
        axis.set_xlabel("% of a plain torch call with the same reads and writes")
        axis.set_title("How close to the memory's limit (the red line)", loc="left")
        handles = [
            plt.Line2D([], [], marker="o", linestyle="", color=c, markersize=a**0.5)
            for c, a, _ in looks.values()
        ]
        figure.legend(handles, [label for _, _, label in looks.values()], loc="outside upper left", ncols=4)
        signed(figure, result)
        return finish(figure, directory / "roofline.png")


def plot_cost(result: dict[str, Any], directory: Path) -> Path | None:
    """Cost per logit against vocabulary at outputs of one size, and time against rows at 32,000 columns."""
    from benchmarks.report import logits_of, scan

    known = [c for c in scan(result["cases"]) if 4 * logits_of(c) < CLIFF]
    wide = [c for c in known if 4 * logits_of(c) > 0.9 * CLIFF]
    long = [c for c in known if c["about"]["vocab"] == 32000]
    if len(wide) < 2 or len(long) < 2:
        return None
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        for axis in (left, right):
            axis.grid(axis="both", visible=True)
            axis.set_xscale("log")
            axis.set_yscale("log")
        seen: dict[int, dict[str, Any]] = {c["about"]["vocab"]: c for c in wide}
        _curves(left, sorted(seen.items()), lambda case, t: 1e9 * t / logits_of(case))
        left.set_xticks(
            sorted(seen), [f"{v // 1000}k" if v >= 1000 else str(v) for v in sorted(seen)], rotation=45
        )
        left.set_xlabel("vocabulary (rows such that the output is just below 32 MiB)")
        left.set_ylabel("ns per logit")
        left.set_title("Cost per logit: forward and backward, fp32", loc="left")
        points = [
            (c["about"]["rows"], c) for c in long if c["about"]["rows"] != 254
        ]  # sorted; 256 is beside it
        _curves(right, points, lambda _, t: 1e3 * t)
        if len(points) >= 3:
            a, b, _ = linear_fit((r, c["providers"][OURS]["median_s"]) for r, c in points)
            rows = [r for r, _ in points]
            right.plot(rows, [1e3 * (a + b * r) for r in rows], ":", color=CONTROL, linewidth=1.4, zorder=5)
            says = f"{1e6 * a:.0f} µs + {1e6 * b:.2f} µs per row"
            right.text(0.97, 0.05, says, transform=right.transAxes, color=CONTROL, ha="right")
        right.set_xticks([r for r, _ in points], [str(r) for r, _ in points])
        right.set_xlabel("rows of 32,000 columns")
        right.set_ylabel("ms per call")
        right.set_title("Time against rows (dotted: the line fitted)", loc="left")
        for axis in (left, right):
            axis.minorticks_off()
            _plain_ticks(axis)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        signed(figure, result)
        return finish(figure, directory / "cost.png")


def _curves(axis: Any, points: list[tuple[int, dict[str, Any]]], value: Any) -> None:
    """Naive, ours and the roofline over one size."""
    for name, colour, label in (
        (NAIVE, INK, "naive"),
        (COMPILED, SECOND, "torch.compile"),
        (OURS, ACCENT, "fasttransfer"),
    ):
        drawn = [
            (x, c, c["providers"][name]) for x, c in points if "median_s" in c["providers"].get(name, {})
        ]
        if len(drawn) < 2:
            continue
        xs = [x for x, _, _ in drawn]
        axis.fill_between(xs, [value(c, p["q1_s"]) for _, c, p in drawn], [value(c, p["q3_s"]) for _, c, p in drawn],
                          color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        axis.plot(
            xs, [value(c, p["median_s"]) for _, c, p in drawn], "o-", color=colour, label=label, markersize=4
        )
    roof = [(x, c, next(iter(c["rooflines"].values()))["median_s"]) for x, c in points]
    axis.plot(
        [x for x, _, _ in roof], [value(c, t) for _, c, t in roof], "--", color=MUTED, label="torch.add(a, b)"
    )


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... in figures that are read at once."""
    low, high = axis.get_ylim()
    steps = [m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)]
    ticks = [t for t in steps if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
