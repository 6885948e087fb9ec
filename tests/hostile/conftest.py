"""What the hostile tests of files share as a fixture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.files import Call, caller, put, right_rows, right_truth


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in a folder with a right annotation, a.json, and right results of it, d.json."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "a.json", right_truth())
    put(tmp_path / "d.json", right_rows())
    return caller(capsys)
