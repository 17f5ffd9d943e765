"""What every command here prints with: one console, one progress display."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH = 100  # the tables are laid out for a terminal of this width, and for a log of it


def console_of_width() -> Console:
    """A console that is never wider than the layout, and exactly as wide in a log."""
    console = Console(file=sys.stdout)  # this one, also where standard output is redirected meanwhile
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def one_progress(console: Console) -> Progress:
    """A progress display with a line per task: name, bar, count, time, and what is happening now (`now=`)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[now]}"),
        console=console,
        refresh_per_second=4,  # the display must not take processor time from what is being timed
    )
