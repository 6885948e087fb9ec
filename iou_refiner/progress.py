"""How long work reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called as work goes on: a command draws bars from it, a test counts."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``phase`` are finished; phases come one after the other."""


def no_progress(phase: str, done: int, total: int) -> None:
    """The :class:`Progress` that nobody watches."""
