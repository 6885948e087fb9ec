"""Categories that a head was not trained on are left to the detector; too many candidates are cut; all are counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner import DataError, Detections, FeatureMaps, HeadConfig, IoUHead, Stage, StageSettings
from iou_refiner.head.config import HeadMetadata, TrainedCategory
from iou_refiner.stage.nms import nms
from tests.kit.accounts import assert_every_box_is_accounted_for
from tests.kit.fixtures import relabelled
from tests.kit.toys import ToyScene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> ToyScene:
    """Boxes of the labels 1 to 3, which come at random."""
    return relabelled(make_scene(tmp_path_factory.mktemp("scene")), 3)


def trained_on(*labels: int, num_classes: int = 0) -> IoUHead:
    """A head whose predictions differ from box to box, trained on some labels."""
    torch.manual_seed(0)
    config = HeadConfig(width=3, hidden=(16,), output_size=3)
    head = IoUHead((4, 4), (1, 2), config, num_classes=num_classes).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head.metadata = HeadMetadata(categories=tuple(TrainedCategory(10 * k, f"thing {k}", k) for k in labels))
    return head


def same(ours: Detections, theirs: Detections) -> None:
    for name in ("boxes", "scores", "labels", "ious"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


PRESETS = [StageSettings(), StageSettings.paper(), StageSettings.detector_only(), StageSettings(nms="none")]


@pytest.mark.parametrize("settings", PRESETS)
def test_where_all_categories_are_trained_nothing_changes(scene, settings):
    without = Stage(trained_on(), settings)(scene.features, scene.candidates)
    for labels in ((1, 2, 3), (0, 1, 2, 3, 4)):
        stage = Stage(trained_on(*labels), settings)
        for ours, theirs in zip(stage(scene.features, scene.candidates), without, strict=True):
            same(ours, theirs)
        assert stage.summary.untrained == 0


@pytest.mark.parametrize("threshold", [0.3, 0.5, None])
@pytest.mark.parametrize("settings", PRESETS)
def test_other_categories_get_the_detectors_own_suppression(scene, settings, threshold):
    settings = settings.replace(max_detections=1000)
    stage = Stage(trained_on(1, 3), settings, own_threshold=threshold)
    only = [c[c.labels != 2] for c in scene.candidates]
    expected = Stage(trained_on(1, 3), settings)(scene.features, only)
    for ours, theirs, before in zip(stage(scene.features, scene.candidates), expected, scene.candidates, strict=True):
        same(ours[ours.labels != 2], theirs)
        rest = before[before.labels == 2]
        keep = rest.scores.argsort(descending=True, stable=True)
        if threshold is not None:
            keep = nms(rest.boxes, rest.scores, threshold=threshold)
        left = ours[ours.labels == 2]
        assert torch.equal(left.boxes, rest.boxes[keep])
        assert torch.equal(left.scores, rest.scores[keep])
        assert (left.ious == 0).all()
        assert (ours.scores.diff() <= 0).all()
    assert stage.summary.untrained == sum(int((c.labels == 2).sum()) for c in scene.candidates)
    assert f"{stage.summary.untrained:,} of categories the head was not trained on" in str(stage.summary)


def test_a_flag_extends_the_head_to_all(scene):
    stage = Stage(trained_on(1), all_categories=True)
    for ours, theirs in zip(
        stage(scene.features, scene.candidates), Stage(trained_on())(scene.features, scene.candidates), strict=True
    ):
        same(ours, theirs)
    assert stage.summary.untrained == 0
    with pytest.raises(ValueError, match="`all_categories` needs a head of one IoU for all classes"):
        Stage(trained_on(1, num_classes=4), all_categories=True)


def test_labels_beyond_a_class_aware_head_are_left_to_the_detector(scene):
    stage = Stage(trained_on(num_classes=3))
    stage(scene.features, scene.candidates)
    assert stage.summary.untrained == sum(int((c.labels == 3).sum()) for c in scene.candidates)


@pytest.mark.parametrize("most", [1, 5, 11, 10_000])
def test_only_the_best_candidates_are_taken_and_the_others_counted(scene, most):
    stage = Stage(trained_on(), StageSettings(nms="none", final_nms="none", max_candidates=most))
    best = [c[c.scores.argsort(descending=True, stable=True)[:most].sort().values] for c in scene.candidates]
    expected = Stage(trained_on(), StageSettings(nms="none", final_nms="none"))(scene.features, best)
    for ours, theirs in zip(stage(scene.features, scene.candidates), expected, strict=True):
        same(ours, theirs)
    assert stage.summary.beyond == sum(max(len(c) - most, 0) for c in scene.candidates)
    assert ("beyond max_candidates" in str(stage.summary)) == (stage.summary.beyond > 0)


_edge = st.sampled_from([0.0, 1.0, 3.0, 8.0, -5.0, 20.0, float("nan"), float("inf"), 1e30])
_rows = st.lists(
    st.tuples(st.tuples(_edge, _edge, _edge, _edge), st.sampled_from([0.25, 0.5, float("inf")]), st.integers(0, 2)),
    max_size=10,
)


@settings(max_examples=60)
@given(
    images=st.lists(_rows, min_size=1, max_size=3),
    chosen=st.sampled_from(PRESETS),
    most=st.sampled_from([1, 3, 100]),
    labels=st.sampled_from([(), (1,), (0, 1, 2)]),
)
def test_every_box_is_accounted_for_and_what_comes_out_is_finite(images, chosen, most, labels):
    features = FeatureMaps(
        (torch.rand(len(images), 4, 8, 8), torch.rand(len(images), 4, 4, 4)), (1, 2), ((8, 8),) * len(images)
    )
    stage = Stage(trained_on(*labels), chosen.replace(max_candidates=most))
    assert_every_box_is_accounted_for(stage, features, images)


@pytest.mark.parametrize(
    "recommended", [{"nms_threshold": "x"}, {"ascent_steps": 1e9}, {"colour": 1}, {"nms": None, "min_gain": []}]
)
def test_what_a_head_recommends_is_checked(recommended):
    head = trained_on()
    head.metadata = replace(head.metadata, recommended=recommended)
    with pytest.raises(DataError, match="recommends cannot be used"):
        Stage(head)
    Stage(head, StageSettings())
