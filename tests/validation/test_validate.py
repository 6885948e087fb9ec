"""Every fault has its code, a good file has none, and one fault does not hide another."""

from __future__ import annotations

import copy
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iou_refiner.coco import read_results
from iou_refiner.validation.findings import Report, format_report
from iou_refiner.validation.validate import validate
from tests.kit.detection_rows import CATEGORIES, SIZES, Rows, Truth, codes_of, good_rows, good_truth, only, run


@pytest.mark.parametrize("truth", [None, good_truth()])
def test_a_good_file_has_no_finding(tmp_path: Path, truth: Truth | None) -> None:
    report = run(tmp_path, good_rows(), truth)
    assert report == Report((), 60, 4, 6)
    assert report.ok
    assert format_report(report) == "60 records, 4 images, 6 categories: 0 kinds of error, 0 of warning"


def test_no_records(tmp_path: Path) -> None:
    assert run(tmp_path, []) == Report((), 0, 0, 0)
    finding = only(run(tmp_path, [], good_truth()))
    assert (finding.code, finding.count) == ("W212", 4)


def every(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Rows], None]:
    def apply(rows: Rows) -> None:
        for row in rows:
            row.update(change(row))

    return apply


def one(**change: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[17].update(change)


def drop(key: str) -> Callable[[Rows], None]:
    return lambda rows: rows[17].pop(key)


def as_corners(row: dict[str, Any]) -> dict[str, Any]:
    x, y, w, h = row["bbox"]
    return {"bbox": [x, y, x + w, y + h]}


def overlapping(rows: Rows) -> None:
    """Pairs with an IoU of .4 to .5, as greedy NMS at .5 leaves them."""
    pairs = []
    for index, overlap in enumerate(np.linspace(0.4, 0.5, 30).tolist()):
        row = {**rows[0], "image_id": 11, "bbox": [200.0 * (index % 3), 45.0 * (index // 3), 100, 40]}
        shift = 100 * (1 - overlap) / (1 + overlap)
        moved = {**row, "bbox": [row["bbox"][0] + shift, *row["bbox"][1:]]}
        pairs += [{**row, "score": 0.5 + index / 99}, {**moved, "score": 0.3 + index / 999}]
    rows[:] = [row for row in rows if row["image_id"] != 11] + pairs


# code -> (change of the records, count, part of the message)
RECORDS: dict[str, tuple[str, Callable[[Rows], Any], int, str]] = {
    "E103": ("E103", one(score=math.nan), 1, "JSON has no NaN"),
    "E201": ("E201", drop("score"), 1, "Every record needs"),
    "E201 iou": ("E201", one(iou=0.5), 59, "in all records or in none"),
    "E202 string": ("E202", one(score="0.91"), 1, "without quotes"),
    "E202 null": ("E202", one(category_id=None), 1, "without quotes"),
    "E202 bool": ("E202", one(score=True), 1, "without quotes"),
    "E203": ("E203", one(bbox=[1, 2, 3]), 1, "[x, y, width, height]"),
    "E205": ("E205", one(bbox=[5, 5, -2, 0]), 1, "negative width"),
    "E301": ("E301", one(image_id=999_999), 1, "(999999). Is this the ground truth of the same split?"),
    "E301 stem": ("E301", every(lambda r: {"image_id": r["image_id"] + 1000}), 60, "file name stems"),
    "E301 place": (
        "E301",
        every(lambda r: {"image_id": list(SIZES).index(r["image_id"])}),
        60,
        "positions in the image",
    ),
    "E302": ("E302", one(category_id=1000), 1, "(1000). Is this the ground truth of the same classes"),
    "E302 contiguous": (
        "E302",
        every(lambda r: {"category_id": CATEGORIES.index(r["category_id"])}),
        20,
        "contiguous labels (yours are 0..5, its 6 are 1..90 with gaps)",
    ),
    "E302 from 1": (
        "E302",
        every(lambda r: {"category_id": CATEGORIES.index(r["category_id"]) + 1}),
        20,
        "contiguous labels (yours are 1..6, its 6 are 1..90 with gaps)",
    ),
    "E303 percent": ("E303", every(lambda r: {"score": 100 * r["score"]}), 58, "percent: divide by 100"),
    "E303 logit": ("E303", one(score=-2.5), 1, "logits: apply the sigmoid"),
    "E303 other": ("E303", one(score=1000.5), 1, "Bring them to [0, 1]"),
    "E303 iou": ("E303", every(lambda r: {"iou": 1.5}), 60, "iou outside [0, 1]"),
    "E501": ("E501", every(as_corners), 60, "look like [x1, y1, x2, y2]"),
    "E502": ("E502", every(lambda r: {"bbox": [value / 700 for value in r["bbox"]]}), 60, "look normalised"),
    "E503": ("E503", every(lambda r: {"bbox": [1.6 * value for value in r["bbox"]]}), 55, "by a factor of about 1.5"),
    "W205": ("W205", one(bbox=[5, 5, 0, 3]), 1, "zero width"),
    "W206": ("W206", one(bbox=[5, 5, 630, 3]), 1, "reach more than 1 pixel beyond"),
    "W210": ("W210", lambda rows: rows.extend([rows[3], rows[3], rows[4]]), 3, "exact duplicates"),
    "W212": ("W212", lambda rows: rows.__setitem__(slice(None), [r for r in rows if r["image_id"] != 25]), 1, "missed"),
    "W213": ("W213", every(lambda r: {"bbox": [int(value) for value in r["bbox"]]}), 1, "whole pixels"),
    "W214": ("W214", every(lambda r: {"score": round(r["score"], 2)}), 1, "at most two decimals"),
    "W220": ("W220", overlapping, 1, "already NMS-ed at about 0.50"),
    "W221": ("W221", every(lambda r: {"score": 0.3 + 0.7 * r["score"]}), 1, "no score is below 0.30"),
    "W230": ("W230", one(segmentation=[[1, 2, 3]]), 1, "refinement drops it"),
    "W250": ("W250", every(lambda r: {"id": 1, "track": 2}), 60, "which are kept: id, track."),
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_fault_of_records_has_its_code_and_no_other(tmp_path: Path, name: str) -> None:
    code, change, count, message = RECORDS[name]
    rows = good_rows()
    change(rows)
    report = run(tmp_path, rows, good_truth())
    finding = only(report)
    assert finding.code == code
    assert finding.count == count
    assert message in finding.message
    assert finding.level == ("error" if code.startswith("E") else "warning")
    assert report.ok == code.startswith("W")
    assert len(finding.examples) <= 5


def test_off_by_one_categories_are_guessed(tmp_path: Path) -> None:
    truth = good_truth()
    truth["categories"] = [{"id": number, "name": "x"} for number in range(1, 8)]
    rows = [{**row, "category_id": index % 7} for index, row in enumerate(good_rows())]
    assert "off by one (yours are 0..6, its 7 are 1..7): add 1" in only(run(tmp_path, rows, truth)).message


def test_corner_boxes_are_seen_without_ground_truth(tmp_path: Path) -> None:
    rows = good_rows()
    every(as_corners)(rows)
    assert only(run(tmp_path, rows)).code == "E501"


def test_large_boxes_inside_their_images_are_not_corners(tmp_path: Path) -> None:
    rows = good_rows()
    for row in rows:
        row["bbox"] = [round(share * side, 2) for share in (0.349, 0.601) for side in SIZES[row["image_id"]]]
    assert "E501" not in codes_of(run(tmp_path, rows, good_truth()))


def test_boxes_a_little_outside_are_of_no_resized_image(tmp_path: Path) -> None:
    rows = good_rows()
    for row in rows:
        row["bbox"] = [1.5, 2.5, *(1.03 * side for side in SIZES[row["image_id"]])]
    assert "W206" in codes_of(run(tmp_path, rows, good_truth()))
    assert "E503" not in codes_of(run(tmp_path, rows, good_truth()))


def test_large_boxes_near_the_origin_are_not_corners(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = good_rows()
    for row in rows:
        row["bbox"] = [*rng.uniform(0, 30, 2).round(2).tolist(), *rng.uniform(100, 280, 2).round(2).tolist()]
    assert codes_of(run(tmp_path, rows)) == []


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"", "E102", "empty"),
        (b'{"predictions": []}', "E101", "'predictions'"),
        (gzip.compress(b"[]"), "E102", "gzip"),
        (b"\x28\xb5\x2f\xfd", "E102", "zstd"),
        (b"\xef\xbb\xbf[]", "E102", "byte order mark"),
        (b'{"a": 1}\n{"a": 2}', "E102", "JSON lines"),
        (json.dumps(good_rows()).encode()[:-9], "E102", "truncated"),
    ],
)
def test_each_fault_of_the_file_has_its_code(tmp_path: Path, content: bytes, code: str, message: str) -> None:
    finding = only(run(tmp_path, content, good_truth()))
    assert finding.code == code
    assert message in finding.message


def test_missing_files_are_findings(tmp_path: Path) -> None:
    report = validate(tmp_path / "a.json", tmp_path / "b.json")
    assert [(finding.code, "no such file" in finding.message) for finding in report.findings] == [("E102", True)] * 2


TRUTHS: dict[str, tuple[str, Callable[[Truth], Any], int, str]] = {
    "W401 twice": ("W401", lambda t: t["annotations"][0].update(id=2), 2, "occur twice"),
    "W401 zero": ("W401", lambda t: t["annotations"][0].update(id=0), 1, "ids are 0"),
    "E401 image": ("E401", lambda t: t["images"][0].update(id=25), 1, "image ids must be unique"),
    "W402 area": ("W402", lambda t: t["annotations"][0].pop("area"), 1, "lack area or iscrowd"),
    "W402 crowd": ("W402", lambda t: t["annotations"][0].pop("iscrowd"), 1, "lack area or iscrowd"),
    "W240": ("W240", lambda t: t["annotations"][0].update(ignore=1), 1, "ignore without iscrowd"),
    "E201": ("E201", lambda t: t["annotations"][0].pop("bbox"), 1, "annotations, entry 1"),
    "E301": ("E301", lambda t: t["annotations"][0].update(image_id=1), 1, "image 1 is not listed"),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_each_fault_of_the_ground_truth_has_its_code(tmp_path: Path, name: str) -> None:
    code, change, count, message = TRUTHS[name]
    truth = copy.deepcopy(good_truth())
    change(truth)
    finding = only(run(tmp_path, good_rows(), truth))
    assert (finding.code, finding.count) == (code, count)
    assert message in finding.message


def test_more_than_a_hundred_per_image(tmp_path: Path) -> None:
    finding = only(run(tmp_path, good_rows(404), good_truth()))
    assert (finding.code, finding.count) == ("W211", 4)
    assert finding.examples[0].text == "101 records"


def test_one_fault_hides_no_other(tmp_path: Path) -> None:
    rows = good_rows()
    rows[4]["score"] = "high"
    rows[8]["image_id"] = 77
    rows[9]["bbox"] = [1, 1, -1, 1]
    rows[11]["score"] = math.inf
    rows[12] = {"image_id": 11}
    rows.append(rows[20])
    truth = good_truth()
    truth["annotations"][0]["id"] = 0
    report = run(tmp_path, rows, truth)
    assert codes_of(report) == ["E103", "E201", "E202", "E205", "E301", "W210", "W401"]
    places = {finding.code: [example.record for example in finding.examples] for finding in report.findings}
    assert places == {
        "E103": [12],
        "E201": [13, 13, 13],
        "E202": [5],
        "E205": [10],
        "E301": [9],
        "W210": [61],
        "W401": [None],
    }
    assert report.records == 58


def test_what_stands_before_a_break_is_still_checked(tmp_path: Path) -> None:
    rows = good_rows()
    rows[1]["score"] = 7.5
    report = run(tmp_path, json.dumps(rows).encode()[:-9])
    assert codes_of(report) == ["E102", "E303"]
    assert report.records == 59


def test_validating_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, good_rows(), good_truth())
    assert json.loads((tmp_path / "dets.json").read_text()) == good_rows()
    assert len(read_results(tmp_path / "dets.json")) == 60
