"""The demo's picture: which boxes it pairs with an object, and what its words say of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from iou_refiner.coco import xywh_to_xyxy
from iou_refiner.demo.picture import _legend, pairs_of
from tests.kit.reference import box_iou
from tests.kit.scenes import make_results, make_truth, scene, seeds

LEFT, RIGHT = (10, 10, 40, 40), (40, 10, 40, 40)  # two objects that overlap
TRUTH = make_truth([1], [1, 2], [(1, 1, LEFT, False), (1, 1, RIGHT, False)])


def test_a_box_of_the_neighbour_is_not_taken_for_one_that_moved_away():
    before = make_results([(1, 1, LEFT, 0.9), (1, 1, RIGHT, 0.9)])
    after = make_results([(1, 1, RIGHT, 0.9)])
    pairs = pairs_of(TRUTH, before, after)
    assert [pair.truth.tolist() for pair in pairs] == [[40, 10, 80, 50]]
    assert pairs[0].iou == (1, 1)


@pytest.mark.parametrize("record", [(1, 2, LEFT, 0.9), (1, 1, LEFT, 0.4), (1, 1, (300, 300, 9, 9), 0.9)])
def test_boxes_of_another_class_unsure_ones_and_strays_are_of_no_object(record: tuple):
    good = make_results([(1, 1, LEFT, 0.9)])
    assert len(pairs_of(TRUTH, good, good)) == 1
    assert pairs_of(TRUTH, good, make_results([record])) == []


@given(seed=seeds)
def test_a_pair_is_of_one_object_and_tells_its_iou(seed: int):
    truth, results = scene(seed, ties=False)
    after = make_results(
        [(i, c, box * [1, 1, 0.9, 1], s) for i, c, box, s in zip(
            results.image_id, results.category_id, results.bbox, results.score, strict=True)]
    )  # fmt: skip
    objects = xywh_to_xyxy(truth.bbox)
    for pair in pairs_of(truth, results, after):
        for box, iou in zip((pair.before, pair.after), pair.iou, strict=True):
            assert iou == pytest.approx(box_iou(tuple(pair.truth), tuple(box)))
            same = (truth.image_id == pair.image.id) & ~truth.iscrowd
            labels = truth.category_id[same & (objects == pair.truth).all(1)]
            rivals = objects[same & np.isin(truth.category_id, labels)]
            assert iou >= max(box_iou(tuple(rival), tuple(box)) for rival in rivals) - 1e-9


def test_the_words_count_better_and_worse_and_say_what_the_colours_mean():
    before = make_results([(1, 1, LEFT, 0.9), (1, 1, (40, 10, 40, 20), 0.9)])
    after = make_results([(1, 1, (10, 10, 40, 30), 0.9), (1, 1, RIGHT, 0.9)])
    words = _legend(pairs_of(TRUTH, before, after), 1, 1, "made images")
    assert "green where the box fits better, red where it fits worse" in words
    assert "Of 2 objects with a box before and after, 1 fit better and 1 worse, mean IoU 0.750 → 0.875" in words
    assert "better and" not in _legend([], 1, 0, "made images")
