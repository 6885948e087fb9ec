"""Wrong results files: what `validate` and `eval` end with and name, what `--fix` repairs, and that they agree."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.coco import opening, read_results, write_results
from tests.hostile.files import (
    SETTINGS,
    SIZES,
    Call,
    Rows,
    boxes,
    caller,
    change_row,
    changed,
    every,
    put,
    right_rows,
    right_truth,
    whole,
)


def one(**change: Any) -> Callable[[Rows], Any]:
    return lambda rows: rows[17].update(change)


def lacking(key: str) -> Callable[[Rows], Any]:
    return lambda rows: rows[17].pop(key)


def text(pattern: str, by: str) -> Callable[[Rows], bytes]:
    """The file with one place of its text changed, in record 18."""

    def apply(rows: Rows) -> bytes:
        lines = [json.dumps(row) for row in rows]
        lines[17], count = re.subn(pattern, lambda _: by, lines[17], count=1)
        assert count == 1
        return ("[" + ",\n".join(lines) + "]").encode()

    return apply


# What is done to right results -> code of the finding, and what both commands name.
ERRORS: dict[str, tuple[Callable[[Rows], Any], str, tuple[str, ...]]] = {
    # the file
    "empty": (whole(lambda _: b""), "E102", ("the file is empty", "holds []")),
    "blank": (whole(lambda _: b" \n\t"), "E102", ("the file is empty",)),
    "object": (whole(lambda _: b"{}"), "E101", ("expected a list of records", "an object")),
    "null": (whole(lambda _: b"null"), "E101", ("expected a JSON list",)),
    "html": (whole(lambda _: b"<html>"), "E102", ("'<html>'",)),
    "terminal codes": (whole(lambda _: b"\x1b[31mred"), "E102", (r"\x1b[31mred",)),
    "gzip without name": (whole(gzip.compress), "E102", ("Rename it to end in .json.gz",)),
    "BOM": (whole(lambda data: b"\xef\xbb\xbf" + data), "E102", ("byte order mark",)),
    "UTF-16": (whole(lambda data: data.decode().encode("utf-16")), "E102", ("UTF-16",)),
    "JSON lines": (lambda rows: "\n".join(map(json.dumps, rows)), "E102", ("JSON lines",)),
    "in a dict": (lambda rows: json.dumps({"annotations": rows}), "E101", ("'annotations'", "save that list alone")),
    "the annotation": (lambda _: json.dumps(right_truth()), "E101", ("ground truth file",)),
    "cut": (whole(lambda data: data[:-30]), "E102", ("truncated", "Copy or write the file again")),
    "unclosed": (whole(lambda data: data[:-1]), "E102", ("truncated",)),
    "trailing comma": (whole(lambda data: data[:-1] + b",]"), "E102", ("',' before the list's closing bracket",)),
    "two lists": (whole(lambda data: data + data), "E102", ("after the list's closing bracket",)),
    "no comma": (whole(lambda data: data.replace(b"}, {", b"} {", 1)), "E102", ("expected a comma",)),
    # a record
    "list": (lambda rows: rows.__setitem__(17, [1]), "E202", ("record 18", "a list of 1", "expected an object")),
    "broken": (text(r'"score": [\d.]+', '"score": '), "E102", ("record 18",)),
    "deep": (text(r'"score"', '"x": ' + "[" * 5000 + "]" * 5000 + ', "score"'), "E102", ("nested too deeply",)),
    "NaN score": (one(score=math.nan), "E103", ("record 18", "NaN", "drop the record")),
    "NaN box": (one(bbox=[1, 2, math.nan, 4]), "E103", ("NaN",)),
    "Infinity": (one(bbox=[1, 2, math.inf, 4]), "E103", ("Infinity",)),
    "NaN elsewhere": (one(note=math.nan), "E103", ("NaN",)),
    "1e999 score": (text(r'"score": [\d.]+', '"score": 1e999'), "E204", ("score is not finite", "Drop the record")),
    "1e999 box": (text(r'"bbox": \[', '"bbox": [1e999, 5, 9, 9], "was": ['), "E204", ("bbox is not finite",)),
    "1e999 elsewhere": (text('"score"', '"note": 1e999, "score"'), "E204", ("key 'note'", "no float holds")),
    "1e999 deep": (text('"score"', '"note": {"a": [1e999]}, "score"'), "E204", ("key 'note'", "no float holds")),
    "integer of 400 digits": (one(image_id=10**400), "E202", ("of 1329 bits",)),
    "surrogate": (text('"score"', r'"note": "\ud800", "score"'), "E102", ("key 'note'", "half a surrogate pair")),
    "surrogate in a key": (text('"score"', r'"n\udc00": 1, "score"'), "E102", (r"n\udc00", "half a surrogate pair")),
    "score twice": (text('"score"', '"score": 0.5, "score"'), "E104", ("'score' stands more than once", "record 18")),
    "bbox twice": (text('"bbox"', '"bbox": [1, 1, 2, 2], "bbox"'), "E104", ("'bbox' stands more than once",)),
    "id twice, escaped": (text('"score"', r'"image\u005fid": 3, "score"'), "E104", ("'image_id' stands more",)),
    "own key twice": (text('"score"', '"a": 1, "a": {"b": 1}, "score"'), "E104", ("'a' stands more than once",)),
    "key with terminal codes twice": (
        text('"score"', r'"\u001b[2J": 1, "\u001b[2J": 2, "score"'), "E104", (r"'\x1b[2J' stands more than once",),
    ),
    "no image": (lacking("image_id"), "E201", ("has no image_id",)),
    "no category": (lacking("category_id"), "E201", ("has no category_id",)),
    "no box": (lacking("bbox"), "E201", ("has no bbox",)),
    "no score": (lacking("score"), "E201", ("has no score",)),
    "iou in one": (one(iou=0.5), "E201", ("iou",)),
    "string id": (one(image_id="3"), "E202", ('"3"', "without quotes")),
    "string id with terminal codes": (one(image_id="\x1b[31m\x7f"), "E202", (r"\u001b[31m\x7f",)),
    "float id": (one(image_id=3.0), "E202", ("the number 3.0", "validate --fix")),
    "half id": (one(image_id=3.5), "E202", ("the number 3.5",)),
    "huge id": (one(image_id=2**63), "E202", ("64 bits",)),
    "boolean score": (one(score=True), "E202", ("a boolean (true)",)),
    "null score": (one(score=None), "E202", ("score is null",)),
    "null iou": (one(iou=None), "E202", ("iou is null",)),
    "three numbers": (one(bbox=[1, 2, 3]), "E203", ("has 3 values",)),
    "nested box": (one(bbox=[[1, 2, 3, 4]]), "E203", ("has 1 values",)),
    "null box": (one(bbox=None), "E203", ("bbox is null",)),
    "string in box": (one(bbox=[1, 2, "3", 4]), "E203", ("a string",)),
    # what it says
    "negative width": (one(bbox=[9, 9, -5, 5]), "E205", ("record 18", "negative width or height")),
    "negative both": (one(bbox=[9, 9, -5, -5]), "E205", ("negative width or height",)),
    "absurdly large": (one(bbox=[0, 0, 1e6, 1e6]), "E207", ("record 18", "1e+10 square pixels", "Drop them")),
    "beyond all numbers": (one(bbox=[0, 0, 1e308, 1e308]), "E207", ("record 18",)),
    "unknown image": (one(image_id=999), "E301", ("(999)", "same split")),
    "negative image": (one(image_id=-(2**63)), "E301", (str(-(2**63)),)),
    "positions": (every(lambda r: {"image_id": list(SIZES).index(r["image_id"])}), "E301", ("positions",)),
    "unknown category": (one(category_id=77), "E302", ("(77)",)),
    "contiguous": (every(lambda r: {"category_id": {1: 0, 2: 1, 5: 2}[r["category_id"]]}), "E302", ("contiguous",)),
    "percent": (every(lambda r: {"score": 100 * r["score"]}), "E303", ("divide by 100",)),
    "logits": (every(lambda r: {"score": math.log(r["score"])}), "E303", ("apply the sigmoid",)),
    "score 1e300": (one(score=1e300), "E303", ("record 18", "Bring them to [0, 1]")),
    "score just above 1": (one(score=1.0000001), "E303", ("record 18",)),
    "iou above 1": (every(lambda r: {"iou": 1.5}), "E303", ("iou outside [0, 1]",)),
    "corners": (boxes(lambda b: [*b[:2], *(b[:2] + b[2:])]), "E501", ("[x1, y1, x2, y2]", "subtract")),
    "normalised": (boxes(lambda b: b / 700), "E502", ("normalised", "Multiply")),
    "larger frame": (boxes(lambda b: b * 1.7), "E503", ("a resized frame",)),
    "a third": (boxes(lambda b: b / 3), "E504", ("scaled by about 0.333", "Scale them back")),
    "half": (boxes(lambda b: b * 0.5), "E504", ("scaled by about 0.5",)),
    "centres": (boxes(lambda b: [*(b[:2] + b[2:] / 2), *b[2:]]), "E505", ("[centre x, centre y, width, height]",)),
}  # fmt: skip


def test_right_results_pass(call: Call) -> None:
    put(Path("d.json"), right_rows())
    status, out, err = call("validate", "d.json", "--ann", "a.json", "--json")
    assert (status, json.loads(out)["findings"], err) == (0, [], "")
    assert call("eval", "d.json", "--ann", "a.json")[0] == 0


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_ends_with_3_and_is_named_by_both(call: Call, name: str) -> None:
    change, code, words = ERRORS[name]
    put(Path("d.json"), changed(right_rows(), change))
    status, out, _ = call("validate", "d.json", "--ann", "a.json")
    assert status == 3
    assert f"{code} error" in out
    for word in words:
        assert word in out
    status, out, err = call("eval", "d.json", "--ann", "a.json")
    assert status == 3
    assert out == ""
    for word in words:
        assert word in err
    assert "\x1b" not in err
    status, out, _ = call("eval", "d.json", "--ann", "a.json", "--baseline", "d.json", "--json")
    assert status == 3
    assert json.loads(out)["exit"] == 3


MEANING = [name for name, (_, code, _) in ERRORS.items() if code in ("E303", "E501", "E502", "E503", "E504", "E505")]


@pytest.mark.parametrize("name", MEANING)
def test_what_can_be_measured_is_measured_without_the_check(call: Call, name: str) -> None:
    put(Path("d.json"), changed(right_rows(), ERRORS[name][0]))
    status, _, err = call("eval", "d.json", "--ann", "a.json")
    assert "--no-check" in err
    status, out, err = call("eval", "d.json", "--ann", "a.json", "--no-check", "--json")
    assert (status, err) == (0, "")
    assert 0 <= json.loads(out)["metrics"]["AP"] <= 1


def test_a_plain_box_that_is_small_is_neither_scaled_nor_centred(call: Call) -> None:
    """Boxes of a poor detector: too small by a third around the right centre."""
    rows = right_rows()
    boxes(lambda b: [*(b[:2] + b[2:] / 6), *(b[2:] / 1.5)])(rows)
    put(Path("d.json"), rows)
    assert call("validate", "d.json", "--ann", "a.json")[0] == 0


class TestFilesThatAreNoFiles:
    @pytest.mark.parametrize("words", [("validate", "X"), ("eval", "X", "--ann", "a.json"), ("validate", "--ann", "X")])
    def test_a_pipe_is_refused_and_never_waited_for(self, call: Call, words: tuple[str, ...]) -> None:
        os.mkfifo("pipe.json")
        status, out, err = call(*("pipe.json" if word == "X" else word for word in words))
        assert status == 3
        assert "a pipe or a device" in out + err

    def test_a_device_a_folder_and_nothing(self, call: Call) -> None:
        for path, words in (("/dev/zero", "a device"), (".", "a folder"), ("absent.json", "no such file")):
            status, _, err = call("eval", path, "--ann", "a.json")
            assert status == 3
            assert words in err

    def test_a_null_character_in_a_path(self, call: Call) -> None:
        status, _, err = call("eval", "d\0.json", "--ann", "a.json")
        assert status == 3
        assert "null character" in err

    def test_what_unpacks_beyond_bounds_stops_there(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening, "_ANY_UNPACKED", 1 << 20)
        record = json.dumps({**right_rows()[0]}).encode() + b","
        bomb = gzip.compress(b"[" + record * 200_000)
        put(Path("bomb.json.gz"), bomb)
        status, _, err = call("eval", "bomb.json.gz", "--ann", "a.json")
        assert status == 3
        assert "unpacks to more than" in err
        assert "times its size on disk" in err

    def test_a_gzip_file_that_is_right_is_read(self, call: Call) -> None:
        put(Path("d.json.gz"), gzip.compress(json.dumps(right_rows()).encode()))
        assert call("eval", "d.json.gz", "--ann", "a.json")[0] == 0

    def test_a_gzip_file_cut_off(self, call: Call) -> None:
        put(Path("d.json.gz"), gzip.compress(json.dumps(right_rows()).encode())[:-20])
        status, _, err = call("eval", "d.json.gz", "--ann", "a.json")
        assert status == 3
        assert "broken or cut off" in err


# What is done to right results -> exit code of the copy, kinds of repair with their number, records of the copy.
REPAIRS: dict[str, tuple[Callable[[Rows], Any], int, dict[str, int], int]] = {
    "nothing": (lambda rows: None, 0, {}, 144),
    "float ids": (
        every(lambda r: {"image_id": float(r["image_id"]), "category_id": float(r["category_id"])}),
        0, {"whole numbers written as 1.0": 288}, 144,
    ),
    "key order": (lambda rows: json.dumps([dict(reversed(row.items())) for row in rows]), 0, {}, 144),
    "duplicates": (lambda rows: rows.extend([rows[3], rows[3], rows[9]]), 0, {"exact duplicates, dropped": 3}, 144),
    "negative": (one(bbox=[9, 9, -5, 5]), 0, {"negative width or height, dropped": 1}, 143),
    "NaN": (one(score=math.nan), 0, {"numbers that are not finite, dropped": 1}, 143),
    "1e999": (text(r'"score": [\d.]+', '"score": 1e999'), 0, {"numbers that are not finite, dropped": 1}, 143),
    "corners": (boxes(lambda b: [*b[:2], *(b[:2] + b[2:])]), 0, {"boxes were corners": 144}, 144),
    "the same twice": (
        lambda rows: text('"score"', f'"score": {rows[17]["score"]}, "score"')(rows),
        0, {"a key twice with one value, once dropped": 1}, 144,
    ),
    "different twice": (text('"score"', '"score": 0.5, "score"'), 3, {}, 144),
    "digits": (one(image_id="3"), 3, {}, 144),
    "half id": (one(image_id=3.5), 3, {}, 144),
    "no score": (lacking("score"), 3, {}, 144),
    "percent": (every(lambda r: {"score": 100 * r["score"]}), 3, {}, 144),
    "unknown image": (one(image_id=999), 3, {}, 144),
    "a third": (boxes(lambda b: b / 3), 3, {}, 144),
    "float id and no score": (lambda rows: (one(image_id=3.0)(rows), lacking("score")(rows)), 3,
                              {"whole numbers written as 1.0": 1}, 144),
}  # fmt: skip


@pytest.mark.parametrize("name", REPAIRS)
def test_fix_repairs_what_is_sure_and_names_it(call: Call, name: str) -> None:
    change, expected, kinds, records = REPAIRS[name]
    put(Path("d.json"), changed(right_rows(), change))
    before = Path("d.json").read_bytes()
    status, out, _ = call("validate", "d.json", "--ann", "a.json", "--fix", "fixed.json", "--json")
    report = json.loads(out)
    assert status == expected
    assert {k: sum(r["kind"] == k for r in report["repairs"]) for k in {r["kind"] for r in report["repairs"]}} == kinds
    assert len(json.loads(Path("fixed.json").read_bytes())) == records
    assert all(repair["record"] >= 1 and repair["reason"] for repair in report["repairs"])
    assert Path("d.json").read_bytes() == before
    assert (call("validate", "fixed.json", "--ann", "a.json")[0] == 0) == (expected == 0)
    assert (call("eval", "fixed.json", "--ann", "a.json")[0] == 0) == (expected == 0)


def test_what_was_right_is_the_same_after_a_repair(call: Call) -> None:
    rows = right_rows()
    rows[17]["score"] = math.nan
    rows[20] |= {"note": {"a": "é"}}
    put(Path("d.json"), rows)
    call("validate", "d.json", "--ann", "a.json", "--fix", "fixed.json.gz")
    copy_of = json.loads(gzip.decompress(Path("fixed.json.gz").read_bytes()))
    assert copy_of == [row for index, row in enumerate(rows) if index != 17]


def test_corners_become_the_boxes_they_were(call: Call) -> None:
    put(Path("d.json"), changed(right_rows(), boxes(lambda b: [*b[:2], *(b[:2] + b[2:])])))
    call("validate", "d.json", "--fix", "fixed.json")
    right = put(Path("right.json"), right_rows())
    np.testing.assert_allclose(read_results("fixed.json").bbox, read_results(right).bbox, atol=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fix", "d.json"), "is also an input"),
        (("--fix", "d.json", "--overwrite"), "is also an input"),
        (("--fix", "a.json", "--overwrite"), "is also an input"),
        (("--fix", "there.json"), "--overwrite"),
        (("--fix", "nowhere/there.json"), "does not exist"),
    ],
)
def test_fix_never_replaces_an_input_nor_unasked(call: Call, words: tuple[str, ...], message: str) -> None:
    put(Path("d.json"), right_rows())
    put(Path("there.json"), "precious")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    status, _, err = call("validate", "d.json", "--ann", "a.json", *words)
    assert status == 2
    assert message in err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.parametrize("name", ["empty", "cut", "broken", "no comma", "in a dict", "deep"])
def test_a_file_that_is_no_list_is_not_repaired(call: Call, name: str) -> None:
    put(Path("d.json"), changed(right_rows(), ERRORS[name][0]))
    status, _, err = call("validate", "d.json", "--fix", "fixed.json")
    assert status == 3
    assert "d.json" in err
    assert not list(Path().glob("fixed*"))


def test_nothing_to_check_is_a_usage_error(call: Call) -> None:
    status, _, err = call("validate")
    assert status == 2
    assert "Nothing to check" in err


# --- right files made wrong at random --------------------------------------------------------------------------------

values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 50), st.floats(), st.text(max_size=4), st.just([]), st.just({"a": [1]}),
    st.sampled_from([-1, 1e300, -1e300, 1e308, 2**63, 10**30, math.inf, "\ud800", [1, 2, 3, 4], [1, 2, -3, 4]]),
)  # fmt: skip
keys = st.sampled_from(["image_id", "category_id", "bbox", "score", "iou", "\x1b[31m"])


@st.composite
def wrong_results(draw: st.DrawFn) -> bytes:
    """Right results after up to four changes: fields dropped, retyped, renamed, negated, repeated; records swapped."""
    rows: list[Any] = copy.deepcopy(right_rows())
    for _ in range(draw(st.integers(1, 4))):
        at, key = draw(st.integers(0, len(rows) - 1)), draw(keys)
        change = draw(st.sampled_from(["drop", "set", "set all", "rename", "negate", "repeat", "swap", "coordinate"]))
        some = rows if change == "set all" else rows[at : at + 1]
        value = draw(values)
        for row in some:
            change_row(row, change, key, value)
            if change == "repeat":
                rows.append(dict(row))
            elif change == "swap":
                rows[at], rows[-1] = rows[-1], rows[at]
    data = json.dumps(rows).encode()
    if draw(st.booleans()):
        return data
    cut = draw(st.integers(0, len(data)))
    return (
        data[:cut]
        + draw(st.sampled_from([b"", b"}", b'"', b"]", b",", b"\xff", b"\x00"]))
        + data[cut:][: draw(st.sampled_from([0, 10**9]))]
    )


@SETTINGS
@given(data=wrong_results())
def test_what_validate_calls_an_error_is_never_measured(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    folder, call = tmp_path_factory.mktemp("wrong"), caller(capsys)
    truth, path = put(folder / "a.json", right_truth()), put(folder / "d.json", data)
    status, out, _ = call("validate", path, "--ann", truth, "--json")
    assert status in (0, 3)
    json.loads(out, parse_constant=pytest.fail)
    measured, out, _ = call("eval", path, "--ann", truth, "--json")
    assert measured == status
    json.loads(out, parse_constant=pytest.fail)
    fixed, out, _ = call("validate", path, "--ann", truth, "--fix", folder / "f.json", "--json")
    assert fixed in (0, 3)
    json.loads(out, parse_constant=pytest.fail)
    if fixed == 0:
        assert call("eval", folder / "f.json", "--ann", truth)[0] == 0
    if status == 0:
        assert fixed == 0
        results = read_results(path)
        write_results(folder / "again.json", results)
        json.loads((folder / "again.json").read_bytes(), parse_constant=pytest.fail)
