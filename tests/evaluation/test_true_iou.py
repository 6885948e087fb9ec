"""The true IoU: the best object of the same image and category, and what pycocotools does not judge is not judged."""

from __future__ import annotations

import contextlib
import io
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_refiner.coco import GroundTruth, xywh_to_xyxy
from iou_refiner.evaluation.true_iou import match_boxes, true_iou
from tests.kit.scenes import make_results, make_truth, scene, seeds


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_true_iou_is_the_best_of_the_same_image_and_category(seed):
    truth, results = scene(seed, ties=False)
    iou = true_iou(results, truth)
    for i, value in enumerate(iou):
        near = (truth.image_id == results.image_id[i]) & (truth.category_id == results.category_id[i])
        overlap = [0.0, 0.0]  # with an object, and with an ignored region
        for j in np.flatnonzero(near):
            kind = int(truth.iscrowd[j])
            here = mask.iou(results.bbox[i : i + 1], truth.bbox[j : j + 1], [kind])[0, 0]
            overlap[kind] = max(overlap[kind], here)
        judged = overlap[1] < 0.5 or overlap[1] <= overlap[0]
        assert value == pytest.approx(overlap[0] if judged else math.nan, abs=1e-9, nan_ok=True)


def test_what_an_ignored_region_covers_is_not_judged():
    ignored = (1, 1, [0, 0, 100, 100], True)
    truth = make_truth([1], [1, 2], [ignored, (1, 1, [0, 0, 20, 10], False)])
    inside, on_object, outside, other = [60, 60, 10, 10], [0, 0, 20, 10], [90, 0, 100, 100], [60, 60, 10, 10]
    records = [(1, 1, inside, 0.5), (1, 1, on_object, 0.5), (1, 1, outside, 0.5), (1, 2, other, 0.5)]
    np.testing.assert_array_equal(true_iou(make_results(records), truth), [np.nan, 1, 0, 0])


def test_empty_boxes_overlap_nothing():
    truth = make_truth([1, 2], [1], [(1, 1, [5, 5, 0, 0], False), (1, 1, [5, 5, 0, 9], True)])
    iou = true_iou(make_results([(1, 1, [5, 5, 0, 0], 0.5), (2, 1, [5, 5, 1, 1], 0.5)]), truth)
    np.testing.assert_array_equal(iou, [0, 0])


# One detection alone, as pycocotools matches it --------------------------------------------------------------------


def matched_alone(truth: GroundTruth, box: list[float], thresholds: np.ndarray) -> tuple[list[int], list[bool]]:
    """For each threshold, the id of the object that pycocotools gives to a detection, 0 for none, and whether it
    ignores the detection."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **truth.to_coco_dict()}
        coco.createIndex()
        evaluator = COCOeval(
            coco, coco.loadRes([{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5}]), "bbox"
        )  # fmt: skip
        evaluator.params.iouThrs = thresholds
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
    (judged,) = [image for image in evaluator.evalImgs if image and image["category_id"] == 1]
    return judged["dtMatches"][:, 0].astype(int).tolist(), judged["dtIgnore"][:, 0].astype(bool).tolist()


_place, _side = st.integers(0, 8), st.integers(1, 9)
_boxes = st.tuples(_place, _place, _side, _side).map(list)


@settings(max_examples=200)
@given(box=_boxes, annotations=st.lists(st.tuples(st.just(1), st.integers(1, 2), _boxes, st.booleans()), max_size=5))
def test_a_single_box_is_judged_and_matched_as_in_pycocotools(box, annotations):
    """Not judged means: at one of the thresholds of AP or above, pycocotools ignores the detection."""
    truth = make_truth([1], [1, 2], annotations)
    same = truth.category_id == 1
    assume(same.any())
    overlaps = mask.iou(np.array([box], float), truth.bbox[same], truth.iscrowd[same].astype(int).tolist())[0]
    # Between two thresholds nothing happens: pycocotools decides anew only at the overlaps themselves.
    thresholds = np.unique([0.5, *overlaps[overlaps >= 0.5]])
    matches, ignored = matched_alone(truth, box, thresholds)
    (iou,), (best,) = match_boxes(
        xywh_to_xyxy(np.array([box], float)), np.array([1]), xywh_to_xyxy(truth.bbox), truth.category_id, truth.iscrowd
    )
    assert math.isnan(iou) == any(ignored)
    objects = overlaps[~truth.iscrowd[same]]
    if not any(ignored):
        assert iou == pytest.approx(objects.max(initial=0), abs=1e-12)
    for match, threshold, not_judged in zip(matches, thresholds, ignored, strict=True):
        if match and not not_judged:
            row = match - 1  # ids count from 1
            assert mask.iou(np.array([box], float), truth.bbox[row : row + 1], [0])[0, 0] == objects.max()
            assert mask.iou(np.array([box], float), truth.bbox[best : best + 1], [0])[0, 0] == objects.max()
            assert objects.max() >= threshold


@pytest.mark.parametrize(
    ("gt_boxes", "ignored", "judged"),
    [
        ([], [[0, 0, 4, 10]], True),  # four tenths lie in the region: less than any threshold
        ([], [[0, 0, 5, 10]], False),
        ([[0, 0, 8, 10]], [[0, 0, 7, 10]], True),  # the object fits better than the region covers
        ([[0, 0, 7, 10]], [[0, 0, 8, 10]], False),
        ([[0, 0, 8, 10]], [[0, 0, 8, 10]], True),
        ([[0, 0, 3, 10]], [[0, 0, 4, 10]], True),  # the region covers more, but too little
        ([], [[0, 0, 3, 10], [3, 0, 3, 10]], True),  # regions count one by one
    ],
)
def test_a_region_hides_a_box_by_what_it_covers(gt_boxes, ignored, judged):
    annotations = [(1, 1, box, False) for box in gt_boxes] + [(1, 1, box, True) for box in ignored]
    truth = make_truth([1], [1], annotations)
    (iou,) = true_iou(make_results([(1, 1, [0, 0, 10, 10], 0.5)]), truth)
    assert math.isnan(iou) is not judged
    assert any(matched_alone(truth, [0, 0, 10, 10], np.arange(0.5, 1.0, 0.05))[1]) is not judged


def test_the_best_object_is_named_even_where_a_box_is_not_judged():
    boxes, labels = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]]), np.array([1, 2, 1])
    gt_boxes = np.array([[0.0, 0, 10, 9], [0, 0, 10, 6], [0, 0, 10, 8]])
    iou, best = match_boxes(boxes, labels, gt_boxes, np.array([2, 1, 1]), np.array([False, False, True]))
    np.testing.assert_allclose(iou, [np.nan, 0.9, 0])
    assert best.tolist()[:2] == [1, 0]


def test_nothing_to_match():
    none = np.zeros((0, 4))
    iou, best = match_boxes(np.ones((2, 4)), np.array([1, 1]), none, np.zeros(0, int), np.zeros(0, bool))
    assert iou.tolist() == best.tolist() == [0, 0]
    iou, best = match_boxes(none, np.zeros(0, int), np.ones((2, 4)), np.array([1, 1]), np.zeros(2, bool))
    assert iou.shape == best.shape == (0,)


def test_matching_needs_no_torch():
    code = "import sys, iou_refiner.evaluation.true_iou; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
