"""COCO json written: read back it is the same, the same results give the same bytes, and no failure leaves a trace."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from iou_refiner.checks import DataError
from iou_refiner.coco import Results, read_results, write, write_results
from tests.kit.coco_files import SETTINGS, assert_same, put, some_results


def test_importing_loads_no_torch() -> None:
    code = "import sys, iou_refiner.coco, iou_refiner.validation.validate; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    monkeypatch.setattr(write, "_ROWS_PER_WRITE", 3)
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
