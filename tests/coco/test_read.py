"""COCO json read: as json.loads reads it, every fault named, and one fault hides no other."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.checks import DataError
from iou_refiner.coco import stream
from iou_refiner.coco.ground_truth import read_ground_truth
from iou_refiner.coco.opening import FormatError, Problem
from iou_refiner.coco.read import iter_results, read_results
from tests.kit.coco_files import GOOD, SETTINGS, TRUTH, finite, put

text = st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "}, {", "]", "[{", '\\\\"}', "é"])
values = st.recursive(
    text | st.integers(-5, 5) | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
records = st.fixed_dictionaries(
    {
        "image_id": st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3),
        "category_id": st.integers(0, 90),
        "bbox": st.lists(finite, min_size=4, max_size=4),
        "score": st.floats(0, 1),
    },
    optional={"segmentation": values, "note": values},
)


@pytest.mark.parametrize("window", [16, 61, 4 << 20])
@SETTINGS
@given(rows=st.lists(records, max_size=6), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_reading_is_json_loads_whatever_the_window(
    tmp_path: Path, window: int, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    path = put(tmp_path, json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_WINDOW", window)
        results = read_results(path)
    assert results.image_id.tolist() == [row["image_id"] for row in rows]
    assert results.category_id.tolist() == [row["category_id"] for row in rows]
    assert results.bbox.tolist() == [row["bbox"] for row in rows]
    assert results.score.tolist() == [row["score"] for row in rows]
    assert results.iou is None
    extra = [{key: value for key, value in row.items() if key in ("segmentation", "note")} for row in rows]
    assert list(results.extra or ({},) * len(rows)) == extra
    if not any(extra):
        assert results.extra is None


def test_reads_gzip_and_iou(tmp_path: Path) -> None:
    path = put(tmp_path, gzip.compress(json.dumps([{**GOOD, "iou": 0.75}]).encode()), "dets.json.gz")
    results = read_results(path)
    assert results.iou is not None
    assert results.iou.tolist() == [0.75]


def replaced(**change: Any) -> bytes:
    record = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    return json.dumps([GOOD, record]).encode()


NAMED = {
    "empty": (b"", "E102", "the file is empty. A file without detections holds \\[\\]"),
    "blank": (b" \n", "E102", "the file is empty"),
    "object": (b'{"a": 1}', "E101", "expected a list of records, found an object"),
    "predictions": (b'{"predictions": []}', "E101", "Its key 'predictions' holds a list: save that list alone"),
    "ground truth": (b'{"images": [{"file_name": 1}], "annotations": []}', "E101", "looks like a ground truth file"),
    "number": (b"3", "E101", "expected a JSON list of records, found '3'"),
    "string": (b'"a"', "E101", "expected a JSON list"),
    "null": (b"null", "E101", "expected a JSON list"),
    "prose": (b"<html>", "E102", "expected a JSON list of records, found '<html>'"),
    "gzip": (gzip.compress(b"[]"), "E102", "is gzip compressed. Rename it to end in .json.gz"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "E102", "is zstd compressed"),
    "zip": (b"PK\x03\x04....", "E102", "is a zip archive"),
    "bom": (b"\xef\xbb\xbf[]", "E102", "begins with a UTF-8 byte order mark"),
    "utf-16": ("[]".encode("utf-16"), "E102", "is UTF-16 text"),
    "json lines": (b'{"image_id": 1}\n{"image_id": 2}\n', "E102", r"one object per line \(JSON lines\)"),
    "truncated": (
        replaced()[:-20],
        "E102",
        "truncated: the list does not close; the last whole record ends at byte 80",
    ),
    "truncated between": (replaced()[:-1], "E102", "truncated"),
    "only a bracket": (b"[", "E102", "truncated"),
    "more after": (b"[] []", "E102", "found '\\[\\]' after the list's closing bracket"),
    "trailing comma": (b"[" + json.dumps(GOOD).encode() + b",]", "E102", "found ',' before the list's closing bracket"),
    "leading comma": (b"[," + json.dumps(GOOD).encode() + b"]", "E102", "expected nothing before it .* found ','"),
    "numbers": (b"[1, 2]", "E102", "found '1, 2' before the list's closing bracket"),
    "wrong bracket": (b"[}", "E102", "a brace where the list should close"),
    "no comma": (replaced().replace(b"}, {", b"} {"), "E102", "expected a comma before it .byte 80., found ''"),
    "list of lists": (b"[[1, 2]]", "E202", "record 1 counting from 1: is a list of 2, expected an object"),
    "broken record": (b'[{"image_id": }]', "E102", "record 1 counting from 1: is not JSON"),
    "deep": (b'[{"x": ' + b"[" * 99999 + b"]" * 99999 + b"}]", "E102", "nested too deeply"),
    "not utf-8": (b'[{"x": "\xff"}]', "E102", "is not JSON"),
    "NaN": (replaced(score=math.nan), "E103", "record 2 .* holds the literal NaN, which JSON does not know"),
    "-Infinity": (replaced(bbox=[0, 0, 1, -math.inf]), "E103", "holds the literal -Infinity"),
    "overflow": (replaced().replace(b"0.5", b"1e999"), "E204", "score is not finite"),
    "no score": (replaced(score=...), "E201", "has no score. Every record needs image_id"),
    "no bbox": (replaced(bbox=...), "E201", "has no bbox"),
    "no image": (replaced(image_id=...), "E201", "record 2 counting from 1: has no image_id"),
    "string image": (replaced(image_id="000139"), "E202", r"image_id is a string \(\"000139\"\), expected an integer"),
    "float image": (replaced(image_id=1.0), "E202", "image_id is the number 1.0, expected an integer"),
    "huge image": (replaced(image_id=2**63), "E202", "expected an integer of 64 bits"),
    "null category": (replaced(category_id=None), "E202", "category_id is null"),
    "true score": (replaced(score=True), "E202", r"score is a boolean \(true\), expected a number"),
    "null iou": (replaced(iou=None), "E202", "iou is null"),
    "iou in one": (replaced(iou=0.5), "E201", "record 1 .* has no iou, though other records have one"),
    "three numbers": (replaced(bbox=[1, 2, 3]), "E203", "bbox has 3 values, expected four numbers"),
    "string in bbox": (replaced(bbox=[1, 2, 3, "4"]), "E203", r"bbox holds a string \(\"4\"\)"),
    "object bbox": (replaced(bbox={"x": 1}), "E203", "bbox is an object, expected four numbers"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_broken_is_named(tmp_path: Path, name: str) -> None:
    content, code, message = NAMED[name]
    with pytest.raises(FormatError, match=message) as caught:
        read_results(put(tmp_path, content))
    assert caught.value.code == code
    assert str(caught.value).startswith(str(tmp_path / "dets.json"))
    assert isinstance(caught.value, DataError)


def test_the_message_names_file_record_image_and_cure(tmp_path: Path) -> None:
    path = put(tmp_path, replaced(score="0.91"))
    with pytest.raises(DataError) as caught:
        read_results(path)
    assert str(caught.value) == (
        f'{path}: record 2 counting from 1 (image 139): score is a string ("0.91"), expected a number. '
        "Write ids as integers and scores as numbers, without quotes."
    )


@pytest.mark.parametrize("window", [40, 4 << 20])
def test_one_fault_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(stream, "_WINDOW", window)
    rows: list[Any] = [GOOD] * 9
    rows[2] = {**GOOD, "score": "x", "bbox": None}
    rows[5] = {**GOOD, "score": math.nan}
    rows[7] = []
    problems: list[Problem] = []
    chunks = list(iter_results(put(tmp_path, rows), problems.append))
    assert [(problem.number, problem.code) for problem in problems] == [
        (3, "E203"),
        (3, "E202"),
        (6, "E103"),
        (8, "E202"),
    ]
    assert np.concatenate([chunk.numbers for chunk in chunks]).tolist() == [1, 2, 4, 5, 7, 9]
    assert sum(len(chunk.results) for chunk in chunks) == 6


def changed_truth(section: str, index: int, **change: Any) -> dict[str, list[dict[str, Any]]]:
    truth: dict[str, list[dict[str, Any]]] = json.loads(json.dumps(TRUTH))
    truth[section][index].update(change)
    return truth


def test_ground_truth_is_read_and_filled(tmp_path: Path) -> None:
    truth = read_ground_truth(put(tmp_path, TRUTH))
    assert [(image.id, image.file_name, image.width, image.height) for image in truth.images] == [
        (9, "b.jpg", 64, 48),
        (4, "a.jpg", 32, 32),
    ]
    assert [(category.id, category.name) for category in truth.categories] == [(2, "cat"), (7, "dog")]
    assert truth.area.tolist() == [13.5, 20]
    assert truth.iscrowd.tolist() == [False, True]
    assert {image: rows.tolist() for image, rows in truth.by_image().items()} == {9: [0, 1], 4: []}
    assert len(truth) == 2


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ([], "E101", "expected an object with images, annotations and categories, found '\\[\\]'"),
        ({"images": []}, "E201", "dets.json: misses the key 'annotations'. Correct it there"),
        (json.dumps(TRUTH).encode()[:-5], "E102", "is not whole JSON"),
        (changed_truth("annotations", 1, area=math.nan), "E103", "holds the literal NaN at byte"),
        (
            changed_truth("annotations", 1, area="20"),
            "E202",
            "annotations, entry 2 counting from 1, area: expected 'float | null', got 'str'",
        ),
        (
            changed_truth("annotations", 0, bbox=[1, 2]),
            "E203",
            "entry 1 counting from 1, bbox: expected 'array' of length 4",
        ),
        (changed_truth("images", 0, width=1.5), "E202", "images, entry 1 counting from 1, width"),
        (changed_truth("images", 0, id=4), "E401", r"image ids must be unique, \[4\] occur more than once"),
        (changed_truth("categories", 0, id=7), "E401", r"category ids must be unique, \[7\]"),
        (changed_truth("annotations", 1, image_id=5), "E301", "annotations, entry 2 .*: image 5 is not listed"),
        (changed_truth("annotations", 1, category_id=5), "E302", r"category 5 is not listed in the file \(1 such\)"),
    ],
)
def test_broken_ground_truth_is_named(tmp_path: Path, content: Any, code: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_ground_truth(put(tmp_path, content))
    assert caught.value.code == code


def test_ground_truth_without_anything(tmp_path: Path) -> None:
    truth = read_ground_truth(put(tmp_path, {"images": [], "annotations": [], "categories": []}))
    assert len(truth) == 0
    assert truth.bbox.shape == (0, 4)
    assert truth.by_image() == {}
