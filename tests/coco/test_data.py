"""Columns: checked, selected, joined, grouped and converted without loss."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.coco.data import Results, group_rows, xywh_to_xyxy, xyxy_to_xywh
from iou_refiner.coco.ground_truth import read_ground_truth
from tests.kit.coco_files import SETTINGS, TRUTH, assert_same, put, some_results


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
    groups = {image: rows.tolist() for image, rows in group_rows(ids).items()}
    assert groups == dict(expected)
    assert list(groups) == sorted(groups)


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
