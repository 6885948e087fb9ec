"""What the head is trained on: boxes with their truth, which is the truth that evaluation measures against."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner import DataError
from iou_refiner.boxes import pairwise_iou
from iou_refiner.coco import Results, xywh_to_xyxy
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.evaluation.true_iou import true_iou
from iou_refiner.rescoring import dump_candidates
from iou_refiner.training.samples import Targets, TrainingSet, collate, sample_boxes
from tests.kit.scenes import make_results, make_truth
from tests.kit.toys import ToyData, make_cached


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyData:
    return make_cached(tmp_path_factory.mktemp("toy"))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ---- Targets. ----


def test_truth_is_the_best_object_of_the_same_class(toy):
    _, truth, _, cache = toy
    extraction, targets = TrainingSet(cache, truth).load(0)
    candidates = extraction.candidates
    iou = pairwise_iou(candidates.boxes, targets.gt_boxes)
    true, best = targets.match(candidates.boxes, candidates.labels)
    torch.testing.assert_close(true, iou.amax(1))
    assert torch.equal(best, targets.gt_boxes[iou.argmax(1)])
    assert torch.equal(targets.true_iou(candidates.boxes, candidates.labels), true)
    assert targets.true_iou(candidates.boxes, candidates.labels + 1).max() == 0


_place, _side = st.integers(0, 8), st.integers(0, 9)
_boxes = st.tuples(_place, _place, _side, _side).map(list)
_annotations = st.lists(st.tuples(st.just(1), st.integers(0, 2), _boxes, st.booleans()), max_size=6)


@settings(max_examples=200)
@given(annotations=_annotations, records=st.lists(st.tuples(st.just(1), st.integers(0, 2), _boxes), max_size=6))
def test_training_and_evaluation_agree_on_every_box(annotations, records):
    """Also where regions are ignored, where boxes are empty, and where an overlap meets the rule's borders exactly."""
    truth, results = make_truth([1], [0, 1, 2], annotations), make_results([(*record, 0.5) for record in records])
    gt_boxes, gt_labels = torch.from_numpy(xywh_to_xyxy(truth.bbox)).float(), torch.from_numpy(truth.category_id)
    ignored = torch.from_numpy(truth.iscrowd)
    targets = Targets(gt_boxes[~ignored], gt_labels[~ignored], gt_boxes[ignored], gt_labels[ignored])
    boxes, labels = torch.from_numpy(xywh_to_xyxy(results.bbox)).float(), torch.from_numpy(results.category_id)
    torch.testing.assert_close(
        targets.true_iou(boxes, labels).double(), torch.from_numpy(true_iou(results, truth)),
        rtol=0, atol=1e-6, equal_nan=True,
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_training_and_evaluation_agree_on_a_data_set(toy, share):
    """From the annotation to the truth of the detector's candidates, by either way, with some objects ignored."""
    _, truth, _, cache = toy
    truth = replace(truth, iscrowd=np.random.default_rng(1).random(len(truth)) < share)
    data = TrainingSet(cache, truth)
    results = Results.concat(dump_candidates(lambda image: cache.load(image), None, truth))
    expected, rows_of = true_iou(results, truth), results.by_image()
    for index, image in enumerate(truth.images):
        extraction, targets = data.load(index)
        candidates = extraction.candidates
        order = candidates.scores.argsort(descending=True, stable=True)  # as in the results
        iou = targets.true_iou(candidates.boxes, candidates.labels)[order]
        torch.testing.assert_close(
            iou.double(), torch.from_numpy(expected[rows_of[image.id]]), rtol=0, atol=1e-5, equal_nan=True
        )
    assert np.isnan(expected).any() == (share > 0)


def test_an_ignored_region_hides_the_boxes_of_its_class_alone(toy):
    _, truth, _, cache = toy
    extraction, targets = TrainingSet(cache, truth).load(0)
    candidates = extraction.candidates
    everything, label = torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([1])
    ignored = Targets(targets.gt_boxes[:0], targets.gt_labels[:0], everything, label)
    assert torch.isnan(ignored.true_iou(candidates.boxes, candidates.labels)).all()
    samples = sample_boxes(extraction, ignored, 10, candidate_share=0.5, jitter_min_iou=0.3, generator=seeded())
    assert len(samples) == 0
    other = Targets(targets.gt_boxes, targets.gt_labels, everything, label + 1)
    expected = targets.true_iou(candidates.boxes, candidates.labels)
    torch.testing.assert_close(other.true_iou(candidates.boxes, candidates.labels), expected)
    samples = sample_boxes(extraction, other, 10, candidate_share=0.5, jitter_min_iou=0.3, generator=seeded())
    assert len(samples) == 10


def test_views_come_with_their_own_objects(toy):
    """The pixels under the objects of every view are the bright ones, and those beside them are not."""
    _, truth, _, cache = toy
    data = TrainingSet(cache, truth, views=3)
    assert len(data) == 3 * len(truth.images)
    objects = 0
    for index in range(len(truth.images), len(data)):
        assert data.items[index] == (truth.images[index % len(truth.images)], index // len(truth.images))
        extraction, targets = data.load(index)
        bright = extraction.features.levels[0][0, 0] > 0.8
        assert len(targets.gt_boxes) == len(targets.gt_labels)
        assert len(targets.ignored_boxes) == len(targets.ignored_labels)
        for x1, y1, x2, y2 in targets.gt_boxes.tolist():
            inside = bright[math.ceil(y1) + 1 : int(y2) - 1, math.ceil(x1) + 1 : int(x2) - 1]
            assert inside.all()
            bright[int(y1) : math.ceil(y2) + 1, int(x1) : math.ceil(x2) + 1] = False
            objects += 1
        for x1, y1, x2, y2 in targets.ignored_boxes.tolist():  # what is mostly cut off
            bright[int(y1) : math.ceil(y2) + 1, int(x1) : math.ceil(x2) + 1] = False
        assert bright.sum() == 0
    assert objects > 1.5 * len(truth.images)


def test_an_image_missing_from_the_cache_is_named(toy, tmp_path):
    folder, truth, detector, _ = toy
    with pytest.raises(DataError, match=r"12 of 12 images are not in the feature cache \(first: image 1\)"):
        TrainingSet(FeatureCache(tmp_path, detector).of(folder), truth)


# ---- Samples. ----


def test_samples_cover_all_iou_and_carry_the_truth(toy):
    _, truth, _, cache = toy
    data, generator, drawn = TrainingSet(cache, truth), seeded(), []
    for index in range(len(data)):
        extraction, targets = data.load(index)
        samples = sample_boxes(extraction, targets, 200, candidate_share=0.2, jitter_min_iou=0.2, generator=generator)
        iou, gt_boxes = targets.match(samples.boxes, samples.labels)
        torch.testing.assert_close(samples.iou, iou)
        assert torch.equal(samples.gt_boxes, gt_boxes)
        assert len(samples) <= 200
        drawn.append(samples.iou)
    counts = torch.histc(torch.cat(drawn), 8, 0.2, 1.0)
    assert counts.min() > 0.5 * counts.max()


@pytest.mark.parametrize(("share", "candidates"), [(0.0, 0), (0.25, 10), (1.0, 24)])
def test_the_share_of_candidates_is_kept_as_far_as_there_are_any(toy, share, candidates):
    _, truth, _, cache = toy
    extraction, targets = TrainingSet(cache, truth).load(0)
    samples = sample_boxes(extraction, targets, 40, candidate_share=share, jitter_min_iou=0.2, generator=seeded())
    known = {tuple(box) for box in extraction.candidates.boxes.tolist()}
    drawn = [tuple(box) for box in samples.boxes.tolist() if tuple(box) in known]
    assert len(drawn) == len(set(drawn)) == min(candidates, len(known))
    assert len(samples) == 40


def test_collating_keeps_every_box_and_says_whose_it_is(toy):
    _, truth, _, cache = toy
    data = TrainingSet(cache, truth)
    parts = [
        sample_boxes(*data.load(index), count, candidate_share=0.5, jitter_min_iou=0.2, generator=seeded())
        for index, count in enumerate((5, 0, 8))
    ]
    batch, image_index = collate(parts)
    assert len(batch) == len(image_index) == sum(map(len, parts))
    for index, part in enumerate(parts):
        own = batch[image_index == index]
        for name in ("boxes", "labels", "iou", "gt_boxes"):
            assert torch.equal(getattr(own, name), getattr(part, name))
