"""True positives at each threshold: those of pycocotools, exactly, whatever is crowded, ignored or tied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.coco import GroundTruth, Results, xywh_to_xyxy
from iou_refiner.evaluation.ap import match
from iou_refiner.siblings.sibling_net import THRESHOLDS
from iou_refiner.training.samples import Targets
from iou_refiner.training.shares import true_positives
from tests.kit.scenes import make_results, make_truth, scene, seeds


def of_pycocotools(results: Results, truth: GroundTruth) -> dict[tuple[int, int], np.ndarray]:
    """For each image and category the matches of its records, by falling score: 1, 0, or NaN where not judged."""
    evaluated = match(results, truth, 1000)
    # One entry for each category, area range and image; the first range takes all areas.
    found: dict[tuple[int, int], np.ndarray] = {}
    for entry in evaluated.evalImgs:
        if entry is not None and entry["aRng"] == evaluated.params.areaRng[0]:
            matched = np.where(entry["dtIgnore"], np.nan, entry["dtMatches"] > 0).T
            found[entry["image_id"], entry["category_id"]] = matched.reshape(-1, 10)
    return found


def ours(results: Results, truth: GroundTruth, image: int) -> tuple[Results, np.ndarray]:
    """The records of an image, and what is a true positive among them."""
    part, rows = results[results.image_id == image], truth.by_image()[image]
    boxes, crowd = torch.from_numpy(xywh_to_xyxy(truth.bbox[rows])).reshape(-1, 4), truth.iscrowd[rows]
    labels = torch.from_numpy(truth.category_id[rows])
    targets = Targets(boxes[~crowd], labels[~crowd], boxes[crowd], labels[crowd])
    given = torch.from_numpy(xywh_to_xyxy(part.bbox)), torch.from_numpy(part.score), torch.from_numpy(part.category_id)
    positive = true_positives(*given, targets)
    assert positive.shape == (len(part), 10)
    assert positive.dtype == torch.float32
    return part, positive.numpy()


def agree(results: Results, truth: GroundTruth) -> None:
    """Compare all images."""
    theirs = of_pycocotools(results, truth)
    for image in (image.id for image in truth.images):
        part, positive = ours(results, truth, image)
        for category in np.unique(part.category_id):
            rows = np.flatnonzero(part.category_id == category)
            rows = rows[np.argsort(-part.score[rows], kind="stable")]
            np.testing.assert_array_equal(positive[rows], theirs[image, int(category)])


@pytest.mark.parametrize("ties", [False, True])
@settings(max_examples=25)
@given(seed=seeds)
def test_they_are_those_of_pycocotools(ties: bool, seed: int) -> None:
    truth, results = scene(seed, ties=ties, images=4)
    known = np.isin(results.category_id, [category.id for category in truth.categories])
    agree(results[known], truth)


_side = st.integers(1, 6)
_box = st.tuples(st.integers(0, 6), st.integers(0, 6), _side, _side)


@settings(max_examples=100)
@given(
    gt=st.lists(st.tuples(_box, st.booleans(), st.integers(1, 2)), max_size=6),
    found=st.lists(st.tuples(_box, st.sampled_from([0.25, 0.5, 0.75]), st.integers(1, 2)), max_size=12),
)
def test_on_a_grid_where_overlaps_tie_and_meet_the_thresholds(gt: Any, found: Any) -> None:
    truth = make_truth([1], [1, 2], [(1, category, box, crowd) for box, crowd, category in gt])
    agree(make_results([(1, category, box, score) for box, score, category in found]), truth)


def test_an_object_inside_a_crowd_is_an_object() -> None:
    boxes = ((10, 10, 20, 20), False), ((0, 0, 100, 100), True)
    truth = make_truth([1], [1], [(1, 1, *box) for box in boxes])
    results = make_results([(1, 1, (10, 10, 20, height), 0.1 * height / 20) for height in (20, 15, 8)])
    agree(results, truth)
    _, positive = ours(results, truth, 1)
    assert (positive[0] == 1).all()
    assert np.isnan(positive[1:]).all()  # duplicates in a crowd are not judged


@pytest.mark.parametrize("swapped", [False, True])
def test_between_two_objects_that_fit_equally_the_choice_is_that_of_pycocotools(swapped: bool) -> None:
    """The first detection lies in the middle; which object it takes decides what is left for the second."""
    objects = [(0, 0, 10, 10), (4, 0, 10, 10)][:: -1 if swapped else 1]
    truth = make_truth([1], [1], [(1, 1, box, False) for box in objects])
    for second in objects:
        agree(make_results([(1, 1, (2, 0, 10, 10), 0.9), (1, 1, second, 0.5)]), truth)


def test_overlaps_of_exactly_a_threshold_and_next_to_it() -> None:
    boxes = ((0, 0, 20, 1), False), ((0, 9, 1, 1), False), ((50, 0, 20, 1), True)
    truth = make_truth([1], [1], [(1, 1, *box) for box in boxes])
    for n in range(10, 20):
        agree(make_results([(1, 1, (0, 0, n, 1), 0.5)]), truth)  # overlaps by n / 20
        agree(make_results([(1, 1, (30 + n, 0, 20, 1), 0.5)]), truth)  # is covered by n / 20
    for threshold in np.linspace(0.5, 0.95, 10):
        for width in (threshold, np.nextafter(threshold, 0), np.nextafter(threshold, 1), threshold - 5e-11):
            agree(make_results([(1, 1, (0, 9, width, 1), 0.5)]), truth)


def test_of_two_detections_of_one_object_one_is_a_duplicate() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    one = torch.zeros(1, dtype=torch.int64)
    targets = Targets(box, one, box[:0], one[:0])
    boxes = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 10], [0, 0, 10, 10]])
    positive = true_positives(boxes, torch.tensor([0.9, 0.8, 0.7]), one.expand(3), targets)
    good = torch.tensor(THRESHOLDS) <= 0.8
    assert torch.equal(positive, torch.stack([good, ~good, torch.zeros(10, dtype=torch.bool)]).float())
    other = true_positives(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 0, 1]), targets)
    assert torch.equal(other.sum(1), torch.tensor([0.0, 10, 0]))


def test_what_a_crowd_covers_is_not_judged() -> None:
    one, crowd = torch.zeros(1, dtype=torch.int64), torch.tensor([[0.0, 0, 100, 100]])
    targets = Targets(crowd[:0], one[:0], crowd, one)
    boxes = torch.tensor([[0.0, 0, 10, 10], [95, 0, 105, 10], [200, 0, 210, 10]])
    positive = true_positives(boxes, torch.tensor([0.9, 0.8, 0.7]), one.expand(3), targets)
    assert torch.isnan(positive[0]).all()
    assert torch.equal(torch.isnan(positive[1]), torch.tensor(THRESHOLDS) <= 0.5)
    assert (positive[2] == 0).all()


def test_of_nothing_there_is_nothing() -> None:
    none, one = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    empty = Targets(none, one, none, one)
    assert true_positives(none, torch.zeros(0), one, empty).shape == (0, 10)
    assert (true_positives(torch.ones(2, 4), torch.ones(2), torch.zeros(2), empty) == 0).all()
