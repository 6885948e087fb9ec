"""How long work reports its progress, and the bars that show it in a terminal and in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, Protocol

_SECONDS_BETWEEN = 0.2  # of two drawings of a notebook's bar


class Progress(Protocol):
    """Called as work goes on: a command draws bars from it, a test counts."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``phase`` are finished; phases come one after the other."""


def no_progress(phase: str, done: int, total: int) -> None:
    """The :class:`Progress` that nobody watches."""


def no_note(text: str) -> None:
    """What is told notes where nobody reads them."""


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Progress]:
    """A bar for each phase: in the cell of a notebook, else on stderr; none where nobody watches."""
    display = _notebook_display() if enabled else None
    if display is not None:
        yield _NotebookBars(display)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    disable = not enabled or not console.is_terminal
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=disable) as bars:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


class _NotebookBars:
    """Bars as HTML's own element, each in a place of the cell's output that is drawn anew. Needs no widgets."""

    def __init__(self, display: Any):
        self._display, self._places = display, dict[str, Any]()
        self._drawn = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Draw, unless it was drawn a moment ago; always the first and the last time."""
        now = time.monotonic()
        if phase in self._places and done < total and now - self._drawn < _SECONDS_BETWEEN:
            return
        self._drawn = now
        bar = self._display.HTML(
            f'<progress value="{done}" max="{max(total, 1)}"></progress> {escape(phase)} {done:,}/{total:,}'
        )
        if phase in self._places:
            self._places[phase].update(bar)
        else:
            self._places[phase] = self._display.display(bar, display_id=True)


def _notebook_display() -> Any:
    """IPython's module of displays where this runs in the kernel of a notebook, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    import IPython.display

    return IPython.display
