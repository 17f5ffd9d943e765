"""A progress bar for what takes long: rich's, where it is installed, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch is the only runtime dependency: rich is imported when a bar is shown
    from rich.progress import Progress

# The display that is on the screen: two at once would overwrite each other's lines.
_shown: ContextVar[Progress | None] = ContextVar("_shown", default=None)


class Bar(Protocol):
    """What ``progress_bar`` yields."""

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more steps as done."""


@contextmanager
def progress_bar(total: int | None, title: str, show: bool | None) -> Iterator[Bar]:
    """A progress bar on stderr while the context is open; one inside another is a further line below it.

    Args:
        total: The number of steps; None: unknown.
        title: What is being done.
        show: None: a bar if rich is installed and stderr is a terminal. True: always. False: never.

    Yields:
        An object with ``advance(n=1)``, whether or not there is a bar.

    Raises:
        TypeError: ``show`` is something else.
        ImportError: ``show`` is True without rich.
    """
    if not (show is None or isinstance(show, bool)):
        raise TypeError(f"progress must be True, False or None, got {show!r}")
    if not _wanted(show):
        yield _Hidden()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    outer = _shown.get()
    if outer is not None:
        inner = _Shown(outer, total, title)
        try:
            yield inner
        finally:
            outer.remove_task(inner.task)  # a loop around it will open the next one
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, *columns, console=Console(stderr=True)) as display:
        token = _shown.set(display)
        try:
            yield _Shown(display, total, title)
        finally:
            _shown.reset(token)


class _Hidden:
    def advance(self, n: int = 1) -> None:
        pass


class _Shown:
    def __init__(self, display: Progress, total: int | None, title: str) -> None:
        self.display = display
        self.task = display.add_task(title, total=total)

    def advance(self, n: int = 1) -> None:
        self.display.advance(self.task, n)


def _wanted(show: bool | None) -> bool:
    on_terminal = sys.stderr is not None and sys.stderr.isatty()  # None: no console, as under pythonw
    if show is False or (show is None and not on_terminal):
        return False
    installed = find_spec("rich") is not None
    if show and not installed:
        raise ImportError("progress=True needs rich: pip install rich")
    return installed
