"""The plots of the examples: results in, one PNG out, no display needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.plots import ACCENT, CONTROL, INK, MUTED, style


def plot_distillation(results: dict[str, Any], directory: Path) -> Path:
    """Accuracy on the missing digit by method, every seed as a dot, and where that knowledge came from."""
    methods, digit = results["methods"], results["missing_digit"]
    temperatures = [name for name in methods if name.startswith("T=") and "blind" not in name]
    blind = next(name for name in methods if "blind" in name)
    order = ["hard labels", blind, *temperatures, "teacher"]
    labels = ["labels\n(control)", f"T = 4, from a\nteacher that\nnever saw a {digit}\n(control)"]
    labels += [name.replace("=", " = ") for name in temperatures] + ["the\nteacher"]
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
    says.set_yticks(range(len(names)), [name.replace("=", " = ") for name in names])
    says.set_ylim(len(names) - 0.5, -0.5)
    says.set_xlim(0, 128)
    says.set_xticks([0, 50, 100])
    says.set_xlabel("probability (%)")
    says.set_title("What the teacher says of it", loc="left")
    says.grid(axis="y", visible=False)
    says.grid(axis="x", visible=True)
