"""Bars: in a terminal, in a notebook, and none where nobody watches."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from iou_refiner.progress import progress_bars


def work() -> None:
    with progress_bars() as bars:
        for done in range(1, 501):
            bars("training <b>", done, 500)


def test_where_nobody_watches_nothing_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    work()
    assert "".join(capsys.readouterr()).strip() == ""


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    work()
    out, err = capsys.readouterr()
    assert "500/500" in err
    assert out == ""


def test_a_notebook_gets_one_place_that_is_drawn_anew(monkeypatch: pytest.MonkeyPatch):
    drawn: list[str] = []

    class Place:
        def update(self, html: str) -> None:
            drawn[-1] = html

    def display(html: str, display_id: bool) -> Place:
        drawn.append(html)
        return Place()

    ipython, displays = ModuleType("IPython"), ModuleType("IPython.display")
    shell: Any = ModuleType("shell")
    shell.kernel = object()
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    displays.HTML, displays.display = str, display  # type: ignore[attr-defined]
    ipython.display = displays  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displays)
    work()
    assert drawn == ['<progress value="500" max="500"></progress> training &lt;b&gt; 500/500']
    with progress_bars(enabled=False) as bars:
        bars("more", 1, 1)
    assert len(drawn) == 1
