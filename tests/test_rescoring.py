from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from iou_refiner import DataError, IoUPredictor, Stage
from iou_refiner.coco import GroundTruth, Results, read_ground_truth, xywh_to_xyxy
from iou_refiner.detector.features import extract_image
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.rescoring import category_map, dump_candidates, rescore
from tests.kit.toys import SIZE, make_dataset


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescoring")
    path, detector = make_dataset(folder, 4)
    torch.manual_seed(0)
    head = IoUPredictor((4, 4), (1, 2), width=3, hidden=(16,), output_size=3).eval()
    return read_ground_truth(path), partial(extract_image, detector, folder), head, detector, folder


def candidates(scene) -> Results:
    truth, look, *_ = scene
    return Results.concat(dump_candidates(look, None, truth))


def test_a_dump_is_the_candidates_in_image_pixels(scene):
    truth, look, *_ = scene
    dumped = candidates(scene)
    found = look(truth.images[0])
    rows = dumped.by_image()[truth.images[0].id]
    expected = found.frame.to_image(
        found.candidates.boxes[found.candidates.scores.argsort(descending=True, stable=True)]
    )
    np.testing.assert_allclose(xywh_to_xyxy(dumped.bbox[rows]), expected.double().numpy(), atol=1e-5)
    assert (np.diff(dumped.score[rows]) <= 0).all()
    top = Results.concat(dump_candidates(look, None, truth, top=5))
    assert len(top) == 5 * len(truth.images)


def test_nothing_to_do_changes_nothing(scene):
    truth, look, head, *_ = scene
    given = candidates(scene)
    out = Results.concat(rescore(look, None, Stage(head, nms="none", moves=0, steps=0, score_alpha=0.0), given, truth))
    assert len(out) == len(given)
    for image, rows in given.by_image().items():
        same = out.by_image()[image]
        np.testing.assert_allclose(out.bbox[same], given.bbox[rows], atol=1e-4)
        np.testing.assert_allclose(out.score[same], given.score[rows], atol=1e-6)
    assert out.iou is not None
    assert ((out.iou >= 0) & (out.iou <= 1)).all()


def test_dump_then_rescore_is_what_the_live_stage_says(scene):
    truth, look, head, *_ = scene
    out = Results.concat(rescore(look, None, Stage(head), candidates(scene), truth))
    for image in truth.images:
        extraction = look(image)
        (live,) = Stage(head)(extraction.features, [extraction.candidates])
        rows = out.by_image()[image.id]
        boxes = extraction.frame.to_image(live.boxes).double().numpy()
        np.testing.assert_allclose(xywh_to_xyxy(out.bbox[rows]), boxes, atol=2e-3)
        np.testing.assert_allclose(out.score[rows], live.scores.double().numpy(), atol=1e-5)


def test_images_without_records_and_empty_files(scene):
    truth, look, head, *_ = scene
    given = candidates(scene)
    one = given[given.image_id == truth.images[2].id]
    out = list(rescore(look, None, Stage(head), one, truth))
    assert [set(part.image_id) for part in out] == [{truth.images[2].id}]
    assert list(rescore(look, None, Stage(head), given[:0], truth)) == []


@pytest.mark.parametrize("steps", [0, 3])
def test_other_keys_stay_with_their_record_and_masks_go_when_boxes_move(scene, steps):
    truth, look, head, *_ = scene
    given = candidates(scene)
    extra = tuple({"track": index, "segmentation": []} for index in range(len(given)))
    given = Results(given.image_id, given.category_id, given.bbox, given.score, None, extra)
    out = Results.concat(rescore(look, None, Stage(head, moves=0, steps=steps), given, truth))
    for row, keys in enumerate(out.extra):
        assert ("segmentation" in keys) == (steps == 0)
        origin = keys["track"]
        assert given.image_id[origin] == out.image_id[row]
        if not steps:
            np.testing.assert_allclose(given.bbox[origin], out.bbox[row], atol=1e-4)


def test_features_that_are_not_finite_are_survived_and_counted(scene):
    truth, look, head, *_ = scene

    def poisoned(image):
        extraction = look(image)
        extraction.features.levels[0].fill_(torch.nan)
        return extraction

    stage = Stage(head)
    out = Results.concat(rescore(poisoned, None, stage, candidates(scene), truth))
    assert np.isfinite(out.bbox).all()
    assert np.isfinite(out.score).all()
    assert (out.iou == 0).all()
    assert stage.summary.unpredicted == len(candidates(scene))


def test_records_of_unknown_images_or_categories_are_named(scene):
    truth, look, head, *_ = scene
    given = candidates(scene)
    for column, message in (("image_id", "no image 77 in the annotation"), ("category_id", "no category 77")):
        ids = {"image_id": given.image_id, "category_id": given.category_id}
        ids[column] = np.where(np.arange(len(given)) == 4, 77, ids[column])
        wrong = Results(ids["image_id"], ids["category_id"], given.bbox, given.score)
        with pytest.raises(DataError, match=f"Record 5 counting from 1: {message}"):
            list(rescore(look, None, Stage(head), wrong, truth))


def test_categories_must_be_shared(scene):
    truth: GroundTruth = scene[0]
    assert category_map({0: 1, 5: 9}, truth) == {0: 1}
    assert category_map(None, truth) == {1: 1}
    with pytest.raises(DataError, match="share no category: the detector has 7, 8, the annotation 1"):
        category_map({0: 7, 1: 8}, truth)


def test_a_cache_gives_the_same_within_half_precision(scene, tmp_path):
    truth, look, head, detector, folder = scene
    cache = FeatureCache(tmp_path, detector, dtype="float32")
    live = Results.concat(rescore(look, None, Stage(head), candidates(scene), truth))
    for _ in range(2):  # filled, then reused
        cached = Results.concat(rescore(partial(cache.get, folder), None, Stage(head), candidates(scene), truth))
        np.testing.assert_array_equal(cached.bbox, live.bbox)
        np.testing.assert_array_equal(cached.iou, live.iou)
    assert truth.images[0].width == SIZE
