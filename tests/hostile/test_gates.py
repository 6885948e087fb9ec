"""Gates that cannot be measured are missed, and settings that make no sense end with 2 before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iou_refiner.coco import read_ground_truth, read_results
from iou_refiner.evaluation.bootstrap import compare
from tests.hostile.files import Call, caller, put, right_rows, right_truth


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    truth = right_truth()
    put(tmp_path / "d.json", right_rows())
    put(tmp_path / "a.json", truth)
    put(tmp_path / "empty.json", {**truth, "annotations": []})
    put(tmp_path / "crowd.json", {**truth, "annotations": [{**a, "iscrowd": 1} for a in truth["annotations"]]})
    put(tmp_path / "none.json", [])
    return caller(capsys)


# annotation, gates -> exit code, what the note names (with "measured": that it cannot be).
GATES: dict[str, tuple[str, tuple[str, ...], int, tuple[str, ...]]] = {
    "reached": ("a.json", ("AP=0.5",), 0, ()),
    "reached exactly": ("a.json", ("AP50=1",), 0, ()),
    "two reached": ("a.json", ("AP=0.5", "AP75=0.5"), 0, ()),
    "negative bar": ("a.json", ("AP=-1",), 0, ()),
    "not reached": ("a.json", ("AP=1.01",), 4, ("AP is ", "below 1.01")),
    "one of two": ("a.json", ("AP=0.5", "AP90=1.5"), 4, ("AP90 is", "below 1.5")),
    "percent": ("a.json", ("AP=38",), 4, ("below 38",)),
    "infinite": ("a.json", ("AP=inf",), 4, ("below inf",)),
    "NaN": ("a.json", ("AP=nan",), 4, ("AP", "cannot be measured", "nan")),
    "NaN in capitals": ("a.json", ("AP=NaN",), 4, ("cannot be measured",)),
    "no small objects": ("a.json", ("APs=0.1",), 4, ("APs cannot be measured",)),
    "no small objects, bar 0": ("a.json", ("APs=0",), 4, ("APs cannot be measured",)),
    "no small objects, bar -1": ("a.json", ("APs=-1",), 4, ("APs cannot be measured",)),
    "no objects": ("empty.json", ("AP=0.38",), 4, ("AP cannot be measured", "no such object")),
    "no objects, bar 0": ("empty.json", ("AP=0",), 4, ("AP cannot be measured",)),
    "no objects, AR": ("empty.json", ("AR=0",), 4, ("AR cannot be measured",)),
    "no objects, bar NaN": ("empty.json", ("AP=nan",), 4, ("AP cannot be measured",)),
    "all crowd": ("crowd.json", ("AP=0.1",), 4, ("AP cannot be measured",)),
    "all crowd, one of two": ("crowd.json", ("AP=0.1", "APl=0"), 4, ("APl cannot be measured",)),
}


@pytest.mark.parametrize("name", GATES)
def test_only_a_value_that_reaches_its_bar_passes(call: Call, name: str) -> None:
    ann, gates, expected, words = GATES[name]
    flags = [word for gate in gates for word in ("--fail-under", gate)]
    status, out, err = call("eval", "d.json", "--ann", ann, "--json", *flags)
    assert status == expected
    json.loads(out, parse_constant=pytest.fail)
    assert ("Gate missed" in err) == (expected == 4)
    for word in words:
        assert word in err
    assert call("eval", "d.json", "--ann", ann, "--quiet", *flags)[0] == expected


@pytest.mark.parametrize(
    ("ann", "gate", "expected"),
    [
        ("a.json", "+AP=0", 0),
        ("a.json", "+AP=-0.1", 0),
        ("a.json", "+AP=0.01", 4),
        ("a.json", "+APs=0", 4),
        ("a.json", "+AP=nan", 4),
        ("empty.json", "+AP=0", 4),
        ("empty.json", "+AP=-1", 4),
        ("crowd.json", "+AP50=0", 4),
    ],
)
def test_a_difference_that_cannot_be_measured_is_missed_too(call: Call, ann: str, gate: str, expected: int) -> None:
    words = ("--baseline", "d.json", "--bootstrap", "5", "--fail-under", gate)
    status, _, err = call("eval", "d.json", "--ann", ann, *words)
    assert status == expected
    assert ("cannot be measured" in err) == (expected == 4 and gate != "+AP=0.01")


def test_no_detections_reach_nothing(call: Call) -> None:
    status, _, err = call("eval", "none.json", "--ann", "a.json", "--fail-under", "AP=0.1")
    assert status == 4
    assert "AP is 0.0000, below 0.1" in err


def test_half_of_the_detections_reach_half(call: Call) -> None:
    put(Path("half.json"), right_rows()[::4])
    for bar, expected in (("0.1", 0), ("0.9", 4)):
        status, _, err = call("eval", "half.json", "--ann", "a.json", "--fail-under", f"AP={bar}")
        assert status == expected
        assert ("below 0.9" in err) == (expected == 4)


# Options -> what the message names. None of the files exists: settings are checked before anything is read.
WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "no such metric": (("--fail-under", "AQ=0.5"), "no such metric"),
    "no name": (("--fail-under", "=0.5"), "no such metric"),
    "no bar": (("--fail-under", "AP"), "NAME=NUMBER"),
    "empty bar": (("--fail-under", "AP="), "NAME=NUMBER"),
    "no number": (("--fail-under", "AP=high"), "NAME=NUMBER"),
    "a comma": (("--fail-under", "AP=0,38"), "NAME=NUMBER"),
    "empty": (("--fail-under", ""), "no such metric"),
    "a difference of nothing": (("--fail-under", "+AP=0"), "needs --baseline"),
    "max-dets 0": (("--max-dets", "0"), "--max-dets"),
    "max-dets -1": (("--max-dets", "-1"), "--max-dets"),
    "max-dets of 30 digits": (("--max-dets", 10**30), "--max-dets"),
    "max-dets many": (("--max-dets", "many"), "--max-dets"),
    "bootstrap -1": (("--bootstrap", "-1"), "--bootstrap"),
    "bootstrap 100001": (("--bootstrap", "100001"), "--bootstrap"),
    "bootstrap 10000000": (("--bootstrap", "10000000"), "100000"),
    "seed -1": (("--seed", "-1"), "--seed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_are_checked_before_anything_is_read(call: Call, name: str) -> None:
    options, message = WRONG[name]
    status, out, err = call("eval", "absent.json", "--ann", "absent.json", *options)
    assert status == 2
    assert message in err
    assert out == ""


@pytest.mark.parametrize("option", [{"max-dets": 0}, {"bootstrap": 10**7}, {"fail-under": ["AQ=1"]}])
def test_settings_from_a_config_are_checked_alike(call: Call, option: dict[str, Any]) -> None:
    put(Path("c.json"), {"eval": option})
    assert call("eval", "d.json", "--ann", "a.json", "--config", "c.json")[0] == 2


def test_the_bound_on_resamples_holds_in_python_too(call: Call) -> None:
    results, truth = read_results("d.json"), read_ground_truth("a.json")
    with pytest.raises(ValueError, match="at most 100,000, got 100001"):
        compare(results, results, truth, resamples=100_001)
    assert compare(results, results, truth, resamples=3).resamples == 3
