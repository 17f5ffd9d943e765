"""The plots of the examples: results in, one PNG out, no display needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.plots import ACCENT, CONTROL, INK, MUTED, SECOND, style


def plot_distillation(results: dict[str, Any], directory: Path) -> Path:
    """Accuracy on the missing digit by method, every seed as a dot, and where that knowledge came from."""
    methods, digit = results["methods"], results["missing_digit"]
    temperatures, controls = results["temperatures"], results["controls"]
    teacher = next(iter(methods))
    order = [controls["labels"], controls["blind"], *temperatures.values(), teacher]
    labels = ["labels\n(control)", f"T = 4, from a\nteacher that\nnever saw a {digit}\n(control)"]
    labels += [*temperatures, "the\nteacher"]
    colours = [CONTROL, CONTROL, *[ACCENT] * len(temperatures), MUTED]
    with style():
        figure, axes = plt.subplot_mosaic(
            [["bars", "image"], ["bars", "says"]],
            figsize=(10, 5),
            width_ratios=(2.3, 1),
            height_ratios=(1, 1.15),
            layout="constrained",
            gridspec_kw={"wspace": 0.08, "hspace": 0.08},
        )
        bars, image, says = axes["bars"], axes["image"], axes["says"]
        for x, (name, colour) in enumerate(zip(order, colours, strict=True)):
            missing = methods[name]["missing"]
            bars.bar(x, 100 * missing["mean"], width=0.62, color=colour, alpha=0.85, zorder=2)
            spread = [0.07 * (i - (len(missing["values"]) - 1) / 2) for i in range(len(missing["values"]))]
            bars.scatter(
                [x + dx for dx in spread], [100 * v for v in missing["values"]],
                s=13, color=INK, alpha=0.75, linewidths=0, zorder=3, clip_on=False,
            )  # fmt: skip
            top = 100 * max(missing["values"] + [missing["mean"]])
            bars.text(x, top + 3, f"{100 * missing['mean']:.0f}", ha="center", fontweight="bold", color=INK)
        bars.set_xticks(range(len(order)), labels)
        bars.set_ylim(0, 112)
        bars.set_yticks(range(0, 101, 25))
        bars.set_ylabel(f"test accuracy on the digit {digit} (%)")
        bars.set_title(f"No student was ever shown a {digit}", loc="left")
        _plot_what_it_says(results, image, says)
        path = directory / "distillation.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _plot_what_it_says(results: dict[str, Any], image: Any, says: Any) -> None:
    """One transfer image, and how much of the missing digit the teacher sees in it at each temperature."""
    shown, digit = results["what_the_teacher_says"], results["missing_digit"]
    image.imshow(shown["image"], cmap="gray_r", interpolation="nearest")
    image.set_xticks([])
    image.set_yticks([])
    for side in image.spines.values():
        side.set_visible(True)
        side.set_color(MUTED)
    image.set_title(f"A {shown['label']} that it was shown", loc="left")
    image.set_anchor("W")
    names = list(shown["probabilities"])
    for row, name in enumerate(names):
        probabilities = shown["probabilities"][name]
        for place, (which, colour) in enumerate(((shown["label"], MUTED), (digit, ACCENT))):
            y = row + 0.19 * (2 * place - 1)
            says.barh(y, 100 * probabilities[which], height=0.34, color=colour, zorder=2)
            says.text(
                100 * probabilities[which] + 2, y, f"{which}:  {100 * probabilities[which]:.1f} %",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
    says.set_yticks(range(len(names)), names)
    says.set_ylim(len(names) - 0.5, -0.5)
    says.set_xlim(0, 128)
    says.set_xticks([0, 50, 100])
    says.set_xlabel("probability (%)")
    says.set_title("What the teacher says of it", loc="left")
    says.grid(axis="y", visible=False)
    says.grid(axis="x", visible=True)


def plot_blending(results: dict[str, Any], directory: Path) -> Path:
    """Accuracy in both domains on the line from the start (alpha = 0) to the fine-tuned weights (1)."""
    titles = {"clean": "Five labels per class", "wrong": "30% of them wrong"}
    with style():
        figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
        for axis, (condition, title) in zip(axes, titles.items(), strict=True):
            found = results[condition]
            looks = {
                "start, target": (ACCENT, "-", "with its start: target domain"),
                "start, source": (SECOND, "-", "with its start: source domain"),
                "another net, target": (CONTROL, "--", "with another net (control): target"),
            }
            for name, (colour, line, label) in looks.items():
                _curve(axis, results["alphas"], found["curves"][name], colour, line, label)
            _level(axis, found["methods"]["from scratch"]["target"], MUTED, "from scratch: target")
            axis.set_title(title, loc="left")
            axis.set_xlabel("alpha (0: the source model, 1: fine-tuned)")
        axes[0].set_ylabel("test accuracy (%)")
        return _finish(figure, axes[0], directory / "blending.png")


def plot_fusion(results: dict[str, Any], directory: Path) -> Path:
    """Accuracy of the GRU's head over alpha, with the fitted and with the random map, and either network alone."""
    methods, lines = results["methods"], results["lines"]
    with style():
        figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
        for name, curve in results["curves"].items():
            control = name == results["control"]
            colour, line = (CONTROL, "--") if control else (ACCENT, "-")
            _curve(axis, results["alphas"], curve, colour, line, name + (" (control)" if control else ""))
        _level(axis, methods[lines["target"]]["target"], INK, "target alone: the GRU")
        _level(axis, methods[lines["source"]]["target"], MUTED, "source alone: the CNN")
        axis.set_title("A CNN's knowledge, read by a GRU's head", loc="left")
        axis.set_xlabel("alpha (0: only the mapped CNN, 1: only the GRU)")
        axis.set_ylabel("test accuracy in the target domain (%)")
        return _finish(figure, axis, directory / "fusion.png")


def plot_language_model(results: dict[str, Any], directory: Path) -> Path:
    """Validation bits per byte by step; three losses on the same batches, their memory and time."""
    colours = [CONTROL, ACCENT, MUTED, SECOND, INK]
    lines = ["-", "-", ":", "--", "-."]
    losses = results["lockstep"]["losses"]
    with style():
        figure, (curves, same, cost) = plt.subplots(
            1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=(1.5, 1.2, 1)
        )
        for (name, of), colour, line in zip(results["students"].items(), colours, lines, strict=True):
            curves.plot(*zip(*of["curve"], strict=True), color=colour, linestyle=line, label=name)
        curves.set_xlabel("step")
        curves.set_ylabel("validation bits per byte")
        curves.set_title("Students of one size", loc="left")
        curves.legend(frameon=False, fontsize=8)
        for (name, of), colour, line, width in zip(
            losses.items(), (MUTED, SECOND, ACCENT), ("-", "--", ":"), (5, 2.5, 2), strict=True
        ):
            same.plot(
                range(1, len(of["curve"]) + 1),
                of["curve"],
                color=colour,
                linestyle=line,
                linewidth=width,
                label=name,
            )
        same.set_xlabel("step")
        same.set_ylabel("training loss")
        same.set_title(f"{results['lockstep']['vocabulary']:,} pieces: one curve", loc="left")
        same.legend(frameon=False, fontsize=8)
        names = list(losses)
        for y, (name, colour) in enumerate(zip(names, (MUTED, SECOND, ACCENT), strict=True)):
            peak = (losses[name]["peak"] or 0) / 1e6
            cost.barh(y, peak, color=colour, height=0.55)
            cost.text(
                peak, y, f" {peak:.0f} MB, {losses[name]['ms']:.0f} ms", va="center", fontsize=9, color=INK
            )
        cost.set_yticks(range(len(names)), [name.replace(" + ", " +\n") for name in names])
        cost.invert_yaxis()
        cost.set_xlim(0, 1.5 * max((of["peak"] or 0) / 1e6 for of in losses.values()))
        cost.set_xlabel("memory of a step (MB)")
        cost.set_title("memory and time", loc="left")
        path = directory / "language_model.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path


def _curve(axis: Any, alphas: Any, curve: list[dict[str, Any]], colour: str, line: str, label: str) -> None:
    """Means over seeds, and a band of one standard deviation."""
    mean = [100 * point["mean"] for point in curve]
    low = [100 * (point["mean"] - point["std"]) for point in curve]
    high = [100 * (point["mean"] + point["std"]) for point in curve]
    axis.fill_between(alphas, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(alphas, mean, line, color=colour, linewidth=2, label=label)


def _level(axis: Any, figure: dict[str, Any], colour: str, label: str) -> None:
    """What does not depend on alpha."""
    axis.axhline(100 * figure["mean"], color=colour, linewidth=1.2, linestyle=":", label=label)


def _finish(figure: Any, axis: Any, path: Path) -> Path:
    axis.set_ylim(0, 100)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
