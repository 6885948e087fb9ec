"""What commands share: bars for each phase, and errors that are usage errors."""

from __future__ import annotations

import pytest

from iou_refiner.cli.console import Console, UsageError, new_file


def console(**changes: bool) -> Console:
    return Console(**{"as_json": False, "device": "auto", "seed": 0, "quiet": False, "verbose": False, **changes})


def test_there_is_a_bar_for_each_phase_where_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with console().progress() as progress:
        for phase, total in (("extracting", 2), ("training", 3)):
            for done in range(1, total + 1):
                progress(phase, done, total)
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("extracting", "2/2", "training", "3/3"):
        assert words in err


@pytest.mark.parametrize("quiet", [False, True])
def test_there_is_no_bar_where_nobody_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if quiet else "")
    assert list(console(quiet=quiet).track("abc", 3, "detecting")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_value_error_inside_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"^`levels` must be$"), console().usage():
        raise ValueError("`levels` must be")


def test_nothing_is_written_over(tmp_path) -> None:
    source, other = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text("[]")
    assert new_file(other, False, inputs=[source]) == other
    with pytest.raises(UsageError, match="is also an input"):
        new_file(source, True, inputs=[source])
    other.write_text("[]")
    with pytest.raises(UsageError, match="Add --overwrite"):
        new_file(other, False, inputs=[source])
    assert new_file(other, True, inputs=[source]) == other
    with pytest.raises(UsageError, match=r"does not exist\. Make it first"):
        new_file(tmp_path / "absent" / "out.json", False, inputs=[source])
