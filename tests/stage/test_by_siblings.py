"""The stage by siblings: with features and without, against the network asked directly, and by its laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner import DataError, Detections, FeatureMaps, HeadConfig, IoUHead, Stage, StageSettings
from iou_refiner.boxes import clip_boxes, decode_boxes
from iou_refiner.head.config import HeadMetadata, TrainedCategory
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.siblings.clusters import Clusters, reach
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.stage.nms import nms
from tests.kit.accounts import assert_every_box_is_accounted_for
from tests.kit.crowds import SMALL, make_crowd, opinionated
from tests.kit.fixtures import relabelled
from tests.kit.toys import SIZE, ToyScene, make_scene

BY_SIBLINGS = StageSettings.by_siblings(move=0.5)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ToyScene:
    """Boxes of the labels 1 to 3, which come at random."""
    return relabelled(make_scene(tmp_path_factory.mktemp("scene")), 3)


def trained_on(labels: tuple[int, ...]) -> HeadMetadata:
    return HeadMetadata(categories=tuple(TrainedCategory(10 * label, f"thing {label}", label) for label in labels))


def boxes_only(*labels: int, config: SiblingConfig = SMALL) -> SiblingHead:
    return opinionated(SiblingHead(config, metadata=trained_on(labels)))


def with_features(*labels: int, num_classes: int = 0) -> IoUHead:
    config = HeadConfig(width=3, hidden=(16,), output_size=3)
    head = IoUHead(
        (4, 4), (1, 2), config, num_classes=num_classes, metadata=trained_on(labels), siblings=SMALL
    )  # fmt: skip
    return opinionated(head)


def features_of(head: Any, scene: ToyScene) -> FeatureMaps | None:
    return None if isinstance(head, SiblingHead) else scene.features


def same(ours: Detections, theirs: Detections) -> None:
    """The same within what a matrix product of another height rounds."""
    assert torch.equal(ours.labels, theirs.labels)
    for name in ("boxes", "scores", "ious"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def directly(head: Any, candidates: Detections, limit: Tensor, image: int, table: Any, move: float) -> Detections:
    """What the network says of one image, asked step by step."""
    net, boxes = head.siblings, torch.minimum(candidates.boxes.clamp(min=0), limit)
    keep = nms(boxes, candidates.scores, candidates.labels, threshold=net.config.nms_threshold)
    keep = keep[: net.config.most_survivors]
    clusters = Clusters.of(boxes, candidates.scores, candidates.labels, keep, net.config)
    limits, embedding = limit.expand(len(boxes), 4), None
    if table is not None:
        embedding = head.roi_embedding(table, boxes[keep], torch.full((len(keep),), image))
    verdict = net(boxes, candidates.scores, limits, clusters, embedding)
    moved = decode_boxes(verdict.deltas * move, boxes[keep])
    judged = candidates[keep].replace(
        boxes=clip_boxes(moved, (float(limit[1]), float(limit[0]))), scores=verdict.scores, ious=verdict.iou
    )
    return judged[judged.scores.argsort(descending=True, stable=True)]


@pytest.mark.parametrize("move", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("make", [boxes_only, with_features])
def test_the_survivors_come_out_as_the_network_says(scene, make, move):
    head = make()
    features = features_of(head, scene)
    table = None if features is None else head.encode(features)
    stage = Stage(head, StageSettings.by_siblings(move=move))
    for index, ours in enumerate(stage(features, scene.candidates)):
        before = scene.candidates[index]
        limit = reach(before.boxes) if features is None else torch.full((4,), float(SIZE))
        same(ours, directly(head, before, limit, index, table, move))
        if not move:
            assert {tuple(box) for box in ours.boxes.tolist()} <= {tuple(box) for box in before.boxes.tolist()}
    expected = stage.summary.detections if move else 0
    assert (stage.summary.refined, stage.summary.moved) == (expected, expected)
    assert stage.settings.refines == (move > 0)


def test_features_have_a_say(scene):
    head = with_features()
    own = Stage(head, BY_SIBLINGS)(scene.features, scene.candidates)
    dark = FeatureMaps(tuple(map(torch.zeros_like, scene.features.levels)), (1, 2), scene.features.image_sizes)
    for ours, other in zip(own, Stage(head, BY_SIBLINGS)(dark, scene.candidates), strict=True):
        assert (ours.scores.sort().values - other.scores.sort().values).abs().max() > 1e-3


@pytest.mark.parametrize("make", [boxes_only, with_features])
def test_images_of_a_batch_do_not_touch_each_other(scene, make):
    head = make()
    candidates = [scene.candidates[0], scene.candidates[1][:0], scene.candidates[2]]  # one is empty
    together = Stage(head, BY_SIBLINGS)(features_of(head, scene), candidates)
    assert len(together[1]) == 0
    for index in range(3):
        levels = tuple(level[index : index + 1] for level in scene.features.levels)
        maps = None if isinstance(head, SiblingHead) else FeatureMaps(levels, (1, 2), ((SIZE, SIZE),))
        (alone,) = Stage(head, BY_SIBLINGS)(maps, [candidates[index]])
        same(together[index], alone)


@pytest.mark.parametrize("make", [boxes_only, with_features])
def test_empty_images_are_ordinary(scene, make):
    head, none = make(), scene.candidates[0][:0]
    stage = Stage(head, BY_SIBLINGS)
    out = stage(features_of(head, scene), [none] * 3)
    assert [len(image) for image in out] == [0, 0, 0]
    assert all(image.ious is not None for image in out)
    assert Stage(boxes_only(), BY_SIBLINGS)(None, []) == []


def test_no_more_survivors_than_the_network_takes(scene):
    few = boxes_only(config=replace(SMALL, most_survivors=2))
    for ours, before in zip(Stage(few, BY_SIBLINGS)(None, scene.candidates), scene.candidates, strict=True):
        keep = nms(before.boxes, before.scores, before.labels, threshold=0.7)[:2]
        assert sorted(ours.labels.tolist()) == sorted(before.labels[keep].tolist())
    stage = Stage(boxes_only(), BY_SIBLINGS, max_detections=1)
    assert [len(image) for image in stage(None, scene.candidates)] == [1, 1, 1]


def test_source_joins_detections_with_candidates(scene):
    candidates = [image.replace(source=torch.arange(len(image))) for image in scene.candidates]
    still = StageSettings.by_siblings(move=0)
    for after, before in zip(Stage(boxes_only(), still)(None, candidates), candidates, strict=True):
        assert torch.equal(after.boxes, before.boxes[after.source])
        assert torch.equal(after.labels, before.labels[after.source])


# ---- Categories. ----


@pytest.mark.parametrize("threshold", [0.4, None])
@pytest.mark.parametrize("make", [boxes_only, with_features])
def test_other_categories_keep_what_the_detector_says(scene, make, threshold):
    head = make(1, 3)
    features = features_of(head, scene)
    stage = Stage(head, BY_SIBLINGS, own_threshold=threshold, max_detections=1000)
    sizes = [reach(image.boxes) for image in scene.candidates]
    for index, ours in enumerate(stage(features, scene.candidates)):
        before = scene.candidates[index]
        limit = sizes[index] if features is None else torch.full((4,), float(SIZE))
        table = None if features is None else head.encode(features)
        same(ours[ours.labels != 2], directly(head, before[before.labels != 2], limit, index, table, 0.5))
        rest, left = before[before.labels == 2], ours[ours.labels == 2]
        keep = rest.scores.argsort(descending=True, stable=True)
        if threshold is not None:
            keep = nms(rest.boxes, rest.scores, threshold=threshold)
        assert torch.equal(left.boxes, rest.boxes[keep])
        assert torch.equal(left.scores, rest.scores[keep])
        assert (left.ious == 0).all()
    assert stage.summary.untrained == sum(int((image.labels == 2).sum()) for image in scene.candidates)


@pytest.mark.parametrize("num_classes", [0, 4])
def test_a_flag_judges_other_categories_by_siblings_without_features(scene, num_classes):
    head = with_features(1, 3, num_classes=num_classes)
    stage = Stage(head, BY_SIBLINGS, all_categories=True, max_detections=1000)
    for index, ours in enumerate(stage(scene.features, scene.candidates)):
        before, limit = scene.candidates[index], torch.full((4,), float(SIZE))
        table = head.encode(scene.features)
        same(ours[ours.labels != 2], directly(head, before[before.labels != 2], limit, index, table, 0.5))
        same(ours[ours.labels == 2], directly(head, before[before.labels == 2], limit, index, None, 0.5))
    assert stage.summary.untrained == 0


def test_a_flag_extends_a_head_without_features_to_all(scene):
    ours = Stage(boxes_only(1), BY_SIBLINGS, all_categories=True)(None, scene.candidates)
    for one, other in zip(ours, Stage(boxes_only(), BY_SIBLINGS)(None, scene.candidates), strict=True):
        same(one, other)


# ---- Settings. ----


def test_siblings_without_a_network_over_them_are_refused():
    with pytest.raises(ValueError, match="`siblings` needs a head with a network over siblings"):
        Stage(IoUHead((4, 4), (1, 2)), siblings=True)


def test_a_head_with_features_needs_them(scene):
    with pytest.raises(ValueError, match="`features` must be given"):
        Stage(with_features(), BY_SIBLINGS)(None, scene.candidates)


def test_a_head_that_listens_to_siblings_is_used_so_unless_it_recommends_otherwise():
    head = boxes_only()
    assert Stage(head).settings == Stage(with_features()).settings == StageSettings.by_siblings()
    head.metadata = HeadMetadata(recommended={"sibling_move": 0.25})
    assert Stage(head).settings == StageSettings.by_siblings(move=0.25)
    head.metadata = HeadMetadata(recommended={"siblings": False})
    assert not Stage(head).settings.siblings
    head.metadata = HeadMetadata(recommended={"siblings": "yes"})
    with pytest.raises(DataError, match="`siblings` must be true or false"):
        Stage(head)


def test_what_the_detector_does_by_itself_needs_no_features(scene):
    stage = Stage(boxes_only(), StageSettings.detector_only(nms_threshold=0.6))
    for ours, before in zip(stage(None, scene.candidates), scene.candidates, strict=True):
        keep = nms(before.boxes, before.scores, before.labels, threshold=0.6)
        assert torch.equal(ours.boxes, before.boxes[keep])
        assert torch.equal(ours.scores, before.scores[keep])
    assert stage.summary.refined == 0


# ---- The worst that can come in. ----


def test_candidates_that_are_not_finite_are_counted_and_do_not_come_out(scene):
    boxes, scores = scene.candidates[0].boxes.clone(), scene.candidates[0].scores.clone()
    boxes[0], boxes[1], scores[2] = torch.nan, torch.tensor([5.0, 5, torch.inf, 9]), torch.nan
    wild, stage = scene.candidates[0].replace(boxes=boxes, scores=scores), Stage(boxes_only(), BY_SIBLINGS)
    (out,) = stage(None, [wild])
    cut = boxes.clone()
    cut[1, 2] = reach(boxes)[0]  # an infinite side ends at the border of the image
    left = torch.tensor([1, *range(3, len(boxes))])
    (expected,) = Stage(boxes_only(), BY_SIBLINGS)(None, [wild.replace(boxes=cut)[left]])
    same(out, expected)
    assert stage.summary.not_finite == 2


def test_a_million_pixels_and_more_stay_finite():
    candidates, _ = make_crowd(0)
    boxes = candidates.boxes.clone()
    boxes[:3, 2:] = 1e30
    (out,) = Stage(boxes_only(), BY_SIBLINGS)(None, [candidates.replace(boxes=boxes)])
    for column in (out.boxes, out.scores, out.ious):
        assert torch.isfinite(column).all()


_edge = st.sampled_from([0.0, 1.0, 3.0, 8.0, -5.0, 20.0, float("nan"), float("inf"), 1e30])
_score = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("inf"), float("nan")])
_rows = st.lists(st.tuples(st.tuples(_edge, _edge, _edge, _edge), _score, st.integers(0, 2)), max_size=10)


@settings(max_examples=60)
@given(
    images=st.lists(_rows, min_size=1, max_size=3),
    make=st.sampled_from([boxes_only, with_features]),
    most=st.sampled_from([1, 3, 100]),
    labels=st.sampled_from([(), (1,), (0, 1, 2)]),
    every=st.booleans(),
)
def test_every_box_is_accounted_for_and_what_comes_out_is_finite(images, make, most, labels, every):
    levels = torch.rand(len(images), 4, 8, 8), torch.rand(len(images), 4, 4, 4)
    features = None if make is boxes_only else FeatureMaps(levels, (1, 2), ((8, 8),) * len(images))
    stage = Stage(make(*labels), BY_SIBLINGS, max_candidates=most, all_categories=every)
    assert_every_box_is_accounted_for(stage, features, images)
