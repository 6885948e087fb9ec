"""Whole data sets: a dump is what the detector has, and rescoring a file is what the live stage does."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict

import numpy as np
import pytest
import torch

from iou_refiner import DataError, Detections, HeadConfig, IoUHead, Stage, StageSettings
from iou_refiner.coco import GroundTruth, Results, read_ground_truth, xywh_to_xyxy
from iou_refiner.detector.sources import FeatureCache, feature_source
from iou_refiner.rescoring import DumpSummary, category_map, dump_candidates, rescore
from tests.kit.toys import SIZE, make_dataset


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescoring")
    path, detector = make_dataset(folder, 4)
    torch.manual_seed(0)
    head = IoUHead((4, 4), (1, 2), HeadConfig(width=3, hidden=(16,), output_size=3)).eval()
    return read_ground_truth(path), feature_source(detector, folder), head, detector, folder


def candidates(scene) -> Results:
    truth, source, *_ = scene
    return Results.concat(dump_candidates(source, None, truth))


def test_a_dump_is_the_candidates_in_image_pixels(scene):
    truth, source, *_ = scene
    dumped = candidates(scene)
    extraction = source(truth.images[0])
    rows = dumped.by_image()[truth.images[0].id]
    expected = extraction.transform.to_image(
        extraction.candidates.boxes[extraction.candidates.scores.argsort(descending=True, stable=True)]
    )
    np.testing.assert_allclose(xywh_to_xyxy(dumped.bbox[rows]), expected.double().numpy(), atol=1e-5)
    assert (np.diff(dumped.score[rows]) <= 0).all()
    top = Results.concat(dump_candidates(source, None, truth, top=5))
    assert len(top) == 5 * len(truth.images)


def test_nothing_to_do_changes_nothing(scene):
    truth, source, head, *_ = scene
    results = candidates(scene)
    out = Results.concat(rescore(source, None, Stage(head, StageSettings.detector_only(), nms="none"), results, truth))
    assert len(out) == len(results)
    for image, rows in results.by_image().items():
        same = out.by_image()[image]
        np.testing.assert_allclose(out.bbox[same], results.bbox[rows], atol=1e-4)
        np.testing.assert_allclose(out.score[same], results.score[rows], atol=1e-6)
    assert out.iou is not None
    assert ((out.iou >= 0) & (out.iou <= 1)).all()


def test_dump_then_rescore_is_what_the_live_stage_says(scene):
    truth, source, head, *_ = scene
    out = Results.concat(rescore(source, None, Stage(head), candidates(scene), truth))
    for image in truth.images:
        extraction = source(image)
        (live,) = Stage(head)(extraction.features, [extraction.candidates])
        rows = out.by_image()[image.id]
        boxes = extraction.transform.to_image(live.boxes).double().numpy()
        np.testing.assert_allclose(xywh_to_xyxy(out.bbox[rows]), boxes, atol=2e-3)
        np.testing.assert_allclose(out.score[rows], live.scores.double().numpy(), atol=1e-5)


def test_images_without_records_and_empty_files(scene):
    truth, source, head, *_ = scene
    results = candidates(scene)
    one = results[results.image_id == truth.images[2].id]
    out = list(rescore(source, None, Stage(head), one, truth))
    assert [set(part.image_id) for part in out] == [{truth.images[2].id}]
    assert list(rescore(source, None, Stage(head), results[:0], truth)) == []


@pytest.mark.parametrize("ascent_steps", [0, 3])
def test_other_keys_stay_with_their_record_and_masks_go_when_boxes_move(scene, ascent_steps):
    truth, source, head, *_ = scene
    results = candidates(scene)
    extra = tuple({"track": index, "segmentation": []} for index in range(len(results)))
    results = Results(results.image_id, results.category_id, results.bbox, results.score, None, extra)
    out = Results.concat(
        rescore(source, None, Stage(head, regression_steps=0, ascent_steps=ascent_steps), results, truth)
    )
    for row, keys in enumerate(out.extra):
        assert ("segmentation" in keys) == (ascent_steps == 0)
        origin = keys["track"]
        assert results.image_id[origin] == out.image_id[row]
        if not ascent_steps:
            np.testing.assert_allclose(results.bbox[origin], out.bbox[row], atol=1e-4)


def test_features_that_are_not_finite_are_survived_and_counted(scene):
    truth, source, head, *_ = scene

    def poisoned(image):
        extraction = source(image)
        extraction.features.levels[0].fill_(torch.nan)
        return extraction

    stage = Stage(head)
    out = Results.concat(rescore(poisoned, None, stage, candidates(scene), truth))
    assert np.isfinite(out.bbox).all()
    assert np.isfinite(out.score).all()
    assert (out.iou == 0).all()
    assert stage.summary.unpredicted == len(candidates(scene))


def test_records_of_unknown_images_or_categories_are_named(scene):
    truth, source, head, *_ = scene
    results = candidates(scene)
    for column, message in (("image_id", "no image 77 in the annotation"), ("category_id", "no category 77")):
        ids = {"image_id": results.image_id, "category_id": results.category_id}
        ids[column] = np.where(np.arange(len(results)) == 4, 77, ids[column])
        wrong = Results(ids["image_id"], ids["category_id"], results.bbox, results.score)
        with pytest.raises(DataError, match=f"Record 5 counting from 1: {message}"):
            list(rescore(source, None, Stage(head), wrong, truth))


def test_the_last_images_alone_are_the_rest(scene):
    truth, source, head, *_ = scene
    results, images = candidates(scene), truth.images[2:]
    for parts in (
        lambda **options: dump_candidates(source, None, truth, **options),
        lambda **options: rescore(source, None, Stage(head), results, truth, **options),
    ):
        every, rest = list(parts()), list(parts(images=images))
        for expected, part in zip(every[2:], rest, strict=True):
            np.testing.assert_array_equal(part.bbox, expected.bbox)
            np.testing.assert_array_equal(part.score, expected.score)


def test_every_candidate_of_a_dump_is_kept_or_counted(scene):
    truth, source, *_ = scene
    nan, inf = float("nan"), float("inf")
    rows = [  # box, score, label
        ((2, 2, 9, 9), 0.9, 1), ((2, 2, 9, 9), 0.8, 1), ((2, 3, 9, 9), 0.1, 1),
        ((3, 3, 8, 8), 0.99, 7), ((3, 3, 8, 8), nan, 7),
        ((3, 3, nan, 8), 0.95, 1), ((3, 3, 8, 8), nan, 1), ((3, 3, inf, 8), 0.3, 1),
        ((5, 5, 5, 9), 0.7, 1), ((9, 9, 5, 12), 0.7, 1), ((900, 5, 910, 9), 0.6, 1),
    ]  # fmt: skip

    def wild(image):
        boxes, scores, labels = zip(*rows, strict=True)
        detections = Detections(torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores), torch.tensor(labels))
        return dataclasses.replace(source(image), candidates=detections)

    summary = DumpSummary()
    dumped = Results.concat(dump_candidates(wild, None, truth, top=5, summary=summary))
    images = len(truth.images)
    assert asdict(summary) == {name: images * count for name, count in {
        "images": 1, "candidates": 11, "records": 2, "other_categories": 2, "not_finite": 3, "beyond": 1, "empty": 2,
        "outside": 1,
    }.items()}  # fmt: skip
    assert len(dumped) == summary.records == summary.candidates - sum(summary.dropped.values())
    np.testing.assert_allclose(dumped.score[:2], [0.9, 0.8])
    assert str(summary) == (
        "4 images; 44 candidates; 8 kept; 36 dropped (8 of other categories, 12 not finite, 4 beyond top, 8 empty, "
        "4 outside the image)"
    )


def test_categories_must_be_shared(scene):
    truth: GroundTruth = scene[0]
    assert category_map({0: 1, 5: 9}, truth) == {0: 1}
    assert category_map(None, truth) == {1: 1}
    with pytest.raises(DataError, match="share no category: the detector has 7, 8, the annotation 1"):
        category_map({0: 7, 1: 8}, truth)


def test_a_cache_gives_the_same_within_half_precision(scene, tmp_path):
    truth, source, head, detector, folder = scene
    cache = FeatureCache(tmp_path, detector, dtype="float32").of(folder)
    live = Results.concat(rescore(source, None, Stage(head), candidates(scene), truth))
    for _ in range(2):  # filled, then reused
        cached = Results.concat(rescore(cache, None, Stage(head), candidates(scene), truth))
        np.testing.assert_array_equal(cached.bbox, live.bbox)
        np.testing.assert_array_equal(cached.iou, live.iou)
    assert truth.images[0].width == SIZE
