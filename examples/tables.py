"""The table that every example prints: a line per method, what it scored, and whether that helped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table

from examples.seeds import verdict

COLOURS = {"helps": "green", "hurts": "red", "unclear": "yellow", "no change": "dim", "few seeds": "dim"}


def comparison(
    title: str,
    methods: Mapping[str, Any],
    figures: Mapping[str, str],
    baselines: Mapping[str, str],
    *,
    notes: Mapping[str, str] | None = None,
    first: str = "method",
) -> Table:
    """Methods as `seeds.summary` gives them.

    `figures`: headers by key, the first being what counts. `baselines`: headers by the name of the method compared
    with; the verdict is that of the first. `notes` replace the verdict of a method (a control, a ceiling).
    """
    notes = notes or {}
    compared = next(iter(baselines.values()))
    grid = _grid(title, f"gains in points, seeds won; verdict: {compared}, by 7 of 8 seeds")
    grid.add_column(first, no_wrap=True)
    for header in (*figures.values(), *baselines.values(), "verdict"):
        grid.add_column(header, justify="right", no_wrap=True)
    for name, method in methods.items():
        cells = [plus_minus(method[key]) if key in method else "" for key in figures]
        cells[0] = f"[bold]{cells[0]}[/]"
        against = method["against"]
        cells += [gain(against[base]) if base in against else "[dim]–[/]" for base in baselines]
        grid.add_row(name, *cells, notes.get(name) or in_words(against.get(next(iter(baselines)))))
    return grid


def against_controls(title: str, methods: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> Table:
    """A line per pair of a method and its own control, in methods as `seeds.summary` gives them."""
    grid = _grid(title, "gain in points, seeds won; verdict by 7 of 8 seeds")
    for header in ("method", "against"):
        grid.add_column(header, no_wrap=True)
    for header in ("target", "its control", "gain", "verdict"):
        grid.add_column(header, justify="right", no_wrap=True)
    for name, control in pairs:
        against = methods[name]["against"][control]
        grid.add_row(
            name,
            control,
            f"[bold]{plus_minus(methods[name]['target'])}[/]",
            plus_minus(methods[control]["target"]),
            gain(against),
            in_words(against),
        )
    return grid


def _grid(title: str, caption: str) -> Table:
    """A table without columns yet."""
    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        title_justify="left",
        min_width=max(min(len(title), 100), 68),  # or the title would be wrapped
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def in_words(against: Mapping[str, Any] | None) -> str:
    """The verdict in its colour; nothing for the baseline itself."""
    if against is None:
        return "[dim]baseline[/]"
    word = verdict(against)
    return f"[{COLOURS[word]}]{word}[/]"


def plus_minus(figure: Mapping[str, Any]) -> str:
    """`mean ± std` in percent."""
    return f"{100 * figure['mean']:.1f} ± {100 * figure['std']:.1f}"


def gain(against: Mapping[str, Any]) -> str:
    """The mean paired difference in points and the seeds won, in the colour of its verdict."""
    figures = f"{100 * against['difference']:+.1f} {against['wins']}/{against['of']}"
    return f"[{COLOURS[verdict(against)]}]{figures}[/]"
