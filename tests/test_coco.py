"""COCO json: what is written is read back, what is broken is named, and nothing depends on where a window ends."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iou_refiner import coco
from iou_refiner._checks import DataError
from iou_refiner.coco import (
    FormatError,
    Problem,
    Results,
    group_rows,
    iter_results,
    read_ground_truth,
    read_results,
    write_results,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = {"image_id": 139, "category_id": 18, "bbox": [1.5, 2, 30.25, 40], "score": 0.5}

finite = st.floats(-1e6, 1e6, allow_nan=False)
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


@st.composite
def some_results(draw: st.DrawFn, with_iou: bool | None = None) -> Results:
    n = draw(st.integers(0, 12))
    score = hnp.arrays(np.float64, n, elements=st.floats(0, 1) | st.sampled_from([0.5, 0.25]))
    if with_iou is None:
        with_iou = draw(st.booleans())
    return Results(
        draw(hnp.arrays(np.int64, n, elements=st.integers(-2, 5))),
        draw(hnp.arrays(np.int64, n, elements=st.integers(1, 90))),
        draw(hnp.arrays(np.float64, (n, 4), elements=finite)),
        draw(score),
        draw(score) if with_iou else None,
        draw(st.none() | st.lists(st.just({}) | st.just({"note": [1]}), min_size=n, max_size=n).map(tuple)),
    )


def assert_same(a: Results, b: Results) -> None:
    for name in ("image_id", "category_id", "bbox", "score"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.iou is None) == (b.iou is None)
    if a.iou is not None and b.iou is not None:
        np.testing.assert_array_equal(a.iou, b.iou)
    assert (a.extra or ({},) * len(a)) == (b.extra or ({},) * len(b))


def put(tmp_path: Path, content: Any, name: str = "dets.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_importing_loads_no_torch() -> None:
    code = "import sys, iou_refiner.coco, iou_refiner.validation; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Columns


@SETTINGS
@given(boxes=hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(4)), elements=st.integers(-99, 99)))
def test_box_formats_are_inverse(boxes: np.ndarray) -> None:
    before = boxes.copy()
    np.testing.assert_array_equal(xyxy_to_xywh(xywh_to_xyxy(boxes)), boxes)
    np.testing.assert_array_equal(xywh_to_xyxy(boxes), [[x, y, x + w, y + h] for x, y, w, h in boxes] or boxes)
    np.testing.assert_array_equal(boxes, before)


@SETTINGS
@given(ids=hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(-3, 3)))
def test_groups_are_the_slow_loop(ids: np.ndarray) -> None:
    expected = defaultdict(list)
    for row, image in enumerate(ids.tolist()):
        expected[image].append(row)
    found = {image: rows.tolist() for image, rows in group_rows(ids).items()}
    assert found == dict(expected)
    assert list(found) == sorted(found)


@SETTINGS
@given(results=some_results(), data=st.data())
def test_concat_undoes_cutting(results: Results, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(results)))
    assert_same(Results.concat([results[:cut], results[cut:]]), results if len(results) else Results.concat([]))


@SETTINGS
@given(results=some_results(), data=st.data())
def test_mask_and_index_select_alike(results: Results, data: st.DataObject) -> None:
    mask = data.draw(hnp.arrays(bool, len(results)))
    assert_same(results[mask], results[np.flatnonzero(mask)])
    assert len(results[mask]) == mask.sum()


def test_concat_refuses_iou_in_some_parts() -> None:
    one = Results(np.ones(1, np.int64), np.ones(1, np.int64), np.ones((1, 4)), np.ones(1))
    other = Results(one.image_id, one.category_id, one.bbox, one.score, np.ones(1))
    with pytest.raises(ValueError, match="`iou` must be in all parts or in none, got it in 1 of 2"):
        Results.concat([one, other])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bbox": np.ones((2, 5))}, ValueError, r"`bbox` must have shape \(2, 4\)"),
        ({"score": np.ones(3)}, ValueError, r"`score` must have shape \(2,\)"),
        ({"iou": np.ones(1)}, ValueError, r"`iou` must have shape \(2,\)"),
        ({"category_id": np.ones(2)}, TypeError, "`category_id` must be int64, got float64"),
        ({"extra": ({},)}, ValueError, "`extra` must hold one dict per record, 2, got 1"),
    ],
)
def test_columns_are_checked(change: dict[str, Any], error: type[Exception], message: str) -> None:
    ids = np.ones(2, np.int64)
    with pytest.raises(error, match=message):
        Results(**{"image_id": ids, "category_id": ids, "bbox": np.ones((2, 4)), "score": np.ones(2), **change})


# Reading


@pytest.mark.parametrize("window", [16, 61, 4 << 20])
@SETTINGS
@given(rows=st.lists(records, max_size=6), indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_reading_is_json_loads_whatever_the_window(
    tmp_path: Path, window: int, rows: list[dict[str, Any]], indent: int | None, ascii_only: bool
) -> None:
    path = put(tmp_path, json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco, "_WINDOW", window)
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


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file\. Check the path"):
        read_results(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path)
    with pytest.raises(DataError, match=r"named \.gz, but its content is not gzip"):
        read_results(put(tmp_path, [], "plain.json.gz"))
    with pytest.raises(DataError, match="the gzip stream is broken or cut off"):
        read_results(put(tmp_path, gzip.compress(json.dumps([GOOD] * 99).encode())[:-12], "cut.json.gz"))


def test_a_record_without_end_stops_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "_WINDOW", 1 << 17)
    monkeypatch.setattr(coco, "_LONGEST_RECORD", 1 << 20)
    path = put(tmp_path, b'[{"image_id": "1, ' + b"." * (2 << 20) + b"}]")
    with pytest.raises(DataError, match="what begins at byte 1 is no record: no end within 1 MiB"):
        read_results(path)


@pytest.mark.parametrize("window", [40, 4 << 20])
def test_one_fault_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(coco, "_WINDOW", window)
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


# Writing


@pytest.mark.parametrize("name", ["out.json", "out.json.gz"])
@SETTINGS
@given(results=some_results())
def test_written_is_read_back_in_order(tmp_path: Path, name: str, results: Results) -> None:
    path = tmp_path / name
    write_results(path, results)
    first_seen = list(dict.fromkeys(results.image_id.tolist()))
    rows = sorted(range(len(results)), key=lambda row: (first_seen.index(results.image_id[row]), -results.score[row]))
    expected = results[np.array(rows, np.int64)]
    iou = None if expected.iou is None or not len(results) else np.round(expected.iou, 6)
    rounded = np.round(expected.bbox, 2), np.round(expected.score, 6), iou
    assert_same(read_results(path), Results(expected.image_id, expected.category_id, *rounded, expected.extra))
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()
    write_results(path, read_results(path))
    assert path.read_bytes() == before
    path.unlink()


def test_written_bytes(tmp_path: Path) -> None:
    ids = np.array([7, 3], np.int64)
    boxes = np.array([[1.234, -0.001, 10, 20.5], [0, 0, 1, 1]])
    extra = ({"note": "é", "score": 9}, {})
    write_results(tmp_path / "out.json", Results(ids, ids, boxes, np.array([0.1234567, 1]), None, extra))
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == (
        '[\n{"image_id":7,"category_id":7,"bbox":[1.23,0.0,10.0,20.5],"score":0.123457,"note":"é"},\n'
        '{"image_id":3,"category_id":3,"bbox":[0.0,0.0,1.0,1.0],"score":1.0}\n]\n'
    )


def test_gzip_holds_no_time_and_no_name(tmp_path: Path) -> None:
    write_results(tmp_path / "out.json.gz", Results.concat([]))
    header = (tmp_path / "out.json.gz").read_bytes()[3:8]
    assert header == bytes(5)  # no flags, so no name; time 0


def test_the_old_file_is_replaced_not_overwritten(tmp_path: Path) -> None:
    path = put(tmp_path, b"before")
    (tmp_path / "link").hardlink_to(path)
    write_results(path, Results.concat([]))
    assert (tmp_path / "link").read_bytes() == b"before"
    assert json.loads(path.read_bytes()) == []


def test_chunks_of_writing_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 10
    results = Results(np.arange(count), np.arange(count), np.ones((count, 4)), np.ones(count))
    write_results(tmp_path / "whole.json", results)
    monkeypatch.setattr(coco, "_ROWS_PER_WRITE", 3)
    write_results(tmp_path / "parts.json", results)
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_image_order_is_followed_and_must_be_whole(tmp_path: Path) -> None:
    ids = np.array([5, 6, 5], np.int64)
    results = Results(ids, ids, np.ones((3, 4)), np.array([0.1, 0.5, 0.9]))
    write_results(tmp_path / "out.json", results, image_order=[9, 6, 5])
    assert read_results(tmp_path / "out.json").score.tolist() == [0.5, 0.9, 0.1]
    with pytest.raises(ValueError, match=r"must list every image of `results`, it lacks \[6\]"):
        write_results(tmp_path / "out.json", results, image_order=[5])


@pytest.mark.parametrize("column", ["bbox", "score", "iou"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_written(tmp_path: Path, column: str, value: float) -> None:
    ids = np.array([5, 6], np.int64)
    columns = {"bbox": np.ones((2, 4)), "score": np.ones(2), "iou": np.ones(2)}
    columns[column][1] = value
    path = put(tmp_path, b"before")
    with pytest.raises(DataError, match=rf"not written: record 2 counting from 1 \(image 6\): {column} is not finite"):
        write_results(path, Results(ids, ids, **columns))
    assert path.read_bytes() == b"before"


def test_a_failed_write_leaves_no_trace(tmp_path: Path) -> None:
    path = put(tmp_path, b"before")
    ids = np.array([1], np.int64)
    unwritable = Results(ids, ids, np.ones((1, 4)), np.ones(1), None, ({"note": object()},))
    with pytest.raises(TypeError):
        write_results(path, unwritable)
    assert [(child.name, child.read_bytes()) for child in tmp_path.iterdir()] == [("dets.json", b"before")]
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Create it first"):
        write_results(tmp_path / "absent" / "out.json", Results.concat([]))


# Ground truth

TRUTH: dict[str, list[dict[str, Any]]] = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "width": 64, "height": 48, "license": 1},
        {"id": 4, "file_name": "a.jpg", "width": 32, "height": 32},
    ],
    "annotations": [
        {"id": 0, "image_id": 9, "category_id": 2, "bbox": [1, 2, 3, 4.5], "segmentation": [[1, 2]]},
        {"id": 0, "image_id": 9, "category_id": 7, "bbox": [0, 0, 5, 5], "area": 20, "iscrowd": 1},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "animal"}],
}


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


def test_pycocotools_finds_every_annotation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO

    truth = read_ground_truth(put(tmp_path, TRUTH))
    index = COCO()
    index.dataset = truth.to_coco_dict()
    index.createIndex()
    assert sorted(index.anns) == [1, 2]
    assert [ann["bbox"] for ann in index.imgToAnns[9]] == truth.bbox.tolist()
    assert [ann["iscrowd"] for ann in index.imgToAnns[9]] == [0, 1]
    index.dataset["annotations"][0]["bbox"][0] = 99
    assert truth.to_coco_dict()["annotations"][0]["bbox"][0] == 1


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
