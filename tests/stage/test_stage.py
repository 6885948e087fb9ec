"""The stage: each part alone, all parts together, and what it does with the worst that can come in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from iou_refiner import Detections, FeatureMaps, Stage, StageSettings, soft_nms
from iou_refiner.boxes import paired_iou, pairwise_iou
from iou_refiner.head.iou_head import Prediction
from tests.kit import fixtures
from tests.kit.toys import SIZE, OracleHead, ToyDetector

# Algorithm 1, and the class score left alone.
PLAIN = StageSettings(
    nms="iou_guided", nms_threshold=0.5, final_nms="iou_guided", rank_alpha=0.75, regression_steps=0, ascent_steps=0,
    ascent_step_size=0.05, score_alpha=0.0,
)  # fmt: skip
GREEDY = PLAIN.replace(nms="greedy", final_nms="greedy")
NONE = PLAIN.replace(nms="none", final_nms="none")


scene, head = fixtures.scene, fixtures.head


class Ordered(OracleHead):
    """Knows which box fits best, and believes that all of them fit by half."""

    def forward(self, *args):
        _, ranking = super().forward(*args)
        return Prediction(torch.full_like(ranking, 0.5), ranking)


class Misled(OracleHead):
    """Knows how well boxes fit, and believes that all objects lie to the right."""

    def __init__(self, gt_boxes):
        super().__init__(gt_boxes)
        self.config = replace(self.config, deltas=True)

    def regress(self, table, boxes, image_index, labels=None):
        return boxes + boxes.new_tensor([6.0, 0, 6, 0])


# ---- What the stage does. ----


def test_with_an_oracle_every_object_gets_one_box_that_fits(scene):
    features, candidates, gt_boxes, _, _ = scene
    stage = Stage(OracleHead(gt_boxes), PLAIN, ascent_steps=30, ascent_step_size=0.1)
    for detections, truth, before in zip(stage(features, candidates), gt_boxes, candidates, strict=True):
        assert len(detections) == len(truth)
        best = pairwise_iou(detections.boxes, truth).amax(1)
        assert best.min() > 0.97
        assert best.min() > pairwise_iou(before.boxes, truth).amax()
        torch.testing.assert_close(detections.ious, best, atol=1e-4, rtol=0)


def test_each_part_alone(scene):
    features, candidates, gt_boxes, _, _ = scene
    oracle = OracleHead(gt_boxes)
    greedy = Stage(oracle, GREEDY)(features, candidates)
    own = ToyDetector.own_suppression(features, candidates)
    for ours, theirs in zip(greedy, own, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
    guided = Stage(oracle, PLAIN)(features, candidates)
    assert sum(d.ious.amax() for d in guided) > sum(d.ious.amax() for d in greedy)
    for ours, theirs, before in zip(guided, greedy, candidates, strict=True):
        assert ours.ious.amax() >= theirs.ious.amax()
        assert ours.scores.max() == before.scores.max()  # the score of the cluster, not of the box
    refined = Stage(oracle, GREEDY, ascent_steps=5)(features, candidates)
    for ours, theirs in zip(refined, greedy, strict=True):
        # Some met on one object and are one now; of those that are left, each fits better than it did.
        before = dict(zip(theirs.scores.tolist(), theirs.ious.tolist(), strict=True))
        gain = ours.ious - torch.tensor([before[score] for score in ours.scores.tolist()])
        assert gain.min() >= -1e-6
        assert gain.max() > 0.01
    scored = Stage(oracle, GREEDY, score_alpha=0.5)(features, candidates)
    for ours in scored:
        assert (ours.scores.diff() <= 0).all()
        assert (ours.ious.diff() <= 0).sum() >= len(ours) - 2
    unsuppressed = Stage(oracle, nms="none", final_nms="none")(features, candidates)
    assert all(len(d) == len(c) for d, c in zip(unsuppressed, candidates, strict=True))


@pytest.mark.parametrize("final_nms", ["iou_guided", "soft"])
def test_the_ranking_ranks_and_is_climbed_and_the_iou_scores(scene, final_nms):
    features, candidates, gt_boxes, _, _ = scene
    ordered, oracle = Ordered(gt_boxes), OracleHead(gt_boxes)
    settings = PLAIN.replace(final_nms=final_nms, ascent_steps=5)
    for ours, theirs in zip(
        Stage(ordered, settings)(features, candidates), Stage(oracle, settings)(features, candidates), strict=True
    ):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
        assert (ours.ious == 0.5).all()
    scored = Stage(ordered, settings, score_alpha=1.0)(features, candidates)
    assert all((d.scores == 0.5).all() for d in scored)


def test_ranked_by_the_iou_the_ranking_has_no_say(scene):
    features, candidates, gt_boxes, _, _ = scene

    class Perverse(Misled):
        """Knows how well boxes fit, and ranks them the other way round."""

        def forward(self, *args):
            iou, _ = super().forward(*args)
            return Prediction(iou, 1 - iou)

    settings = PLAIN.replace(rank_alpha=1.0, ascent_steps=5, regression_steps=1)
    perverse = Perverse(gt_boxes)
    expected = Stage(Misled(gt_boxes), settings)(features, candidates)
    by_iou = Stage(perverse, settings, rank_by="iou")(features, candidates)
    for ours, theirs in zip(by_iou, expected, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.ious, theirs.ious)
    by_ranking = Stage(perverse, settings, rank_by="ranking")(features, candidates)
    for ours, theirs in zip(by_ranking, expected, strict=True):
        assert ours.ious.amax() < theirs.ious.amax() - 0.3


def test_refined_boxes_that_gain_nothing_return(scene):
    features, candidates, gt_boxes, _, _ = scene
    head = Misled(gt_boxes)
    still = Stage(head, NONE)(features, candidates)
    stage = Stage(head, NONE, regression_steps=1)
    for ours, theirs in zip(stage(features, candidates), still, strict=True):
        moved = (ours.boxes != theirs.boxes).any(1)
        assert (ours.ious >= theirs.ious).all()
        assert torch.equal(ours.ious > theirs.ious, moved)  # some do lie to the right
    assert 0 < stage.summary.moved < stage.summary.refined
    for changes in ({"regression_steps": 1}, {"ascent_steps": 5}):
        wary = Stage(head, NONE, **changes, min_gain=1.0)(features, candidates)
        assert all(torch.equal(ours.boxes, theirs.boxes) for ours, theirs in zip(wary, still, strict=True))


def test_soft_suppression(scene):
    features, candidates, gt_boxes, _, _ = scene
    oracle = OracleHead(gt_boxes)
    soft = PLAIN.replace(nms_threshold=0.9, final_nms="soft")
    classic = Stage(oracle, soft, nms="none", rank_alpha=0.0)(features, candidates)
    for ours, before in zip(classic, candidates, strict=True):
        keep, scores = soft_nms(before.boxes, before.scores, before.labels)
        assert torch.equal(ours.boxes, before.boxes[keep])
        torch.testing.assert_close(ours.scores, scores)
    guided = Stage(oracle, soft, final_nms="iou_guided")(features, candidates)
    ranked = Stage(oracle, soft)(features, candidates)
    for ours, hard in zip(ranked, guided, strict=True):
        before = {tuple(box): score for box, score in zip(hard.boxes.tolist(), hard.scores.tolist(), strict=True)}
        share = ours.scores / torch.tensor([before[tuple(box)] for box in ours.boxes.tolist()])
        assert share.max() <= 1 + 1e-6
        assert share.min() < 0.9
        # Whoever fits best keeps its whole score: nobody ranks above it.
        assert share[ours.ious.argmax()].item() == pytest.approx(1)


def test_source_joins_detections_with_candidates(scene, head):
    features, candidates, _, _, _ = scene
    candidates = [d.replace(source=torch.arange(len(d))) for d in candidates]
    detections = Stage(head, regression_steps=0, ascent_steps=0)(features, candidates)
    for after, before in zip(detections, candidates, strict=True):
        assert torch.equal(after.boxes, before.boxes[after.source])


# ---- Laws. ----


def test_images_of_a_batch_do_not_touch_each_other(scene, head):
    features, candidates, _, _, _ = scene
    stage = Stage(head)
    together = stage(features, candidates)
    for index in range(3):
        maps = FeatureMaps(tuple(level[index : index + 1] for level in features.levels), (1, 2), ((SIZE, SIZE),))
        (alone,) = stage(maps, [candidates[index]])
        torch.testing.assert_close(alone.boxes, together[index].boxes, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(alone.ious, together[index].ious, atol=1e-5, rtol=1e-5)


def test_plain_no_grad_and_inference_mode_agree(scene, head):
    features, candidates, _, _, _ = scene
    results = [Stage(head)(features, candidates)]
    with torch.no_grad():
        results.append(Stage(head)(features, candidates))
    with torch.inference_mode():
        inside = FeatureMaps(tuple(level.clone() for level in features.levels), (1, 2), features.image_sizes)
        boxes = [Detections(c.boxes.clone(), c.scores.clone(), c.labels.clone()) for c in candidates]
        results.append(Stage(head)(inside, boxes))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.boxes, b.boxes)
            assert torch.equal(a.scores, b.scores)
            assert torch.equal(a.ious, b.ious)


def test_features_that_are_not_finite_leave_boxes_as_they_were_and_are_counted(scene, head):
    features, candidates, _, _, _ = scene
    levels = tuple(level.clone() for level in features.levels)
    levels[0][1] = torch.nan
    stage = Stage(head, PLAIN, score_alpha=0.5, regression_steps=1, ascent_steps=5)
    after = stage(FeatureMaps(levels, (1, 2), features.image_sizes), candidates)
    expected = Stage(head, GREEDY)(features, candidates)[1]
    assert torch.equal(after[1].boxes, expected.boxes)  # what the detector itself would have said
    assert torch.equal(after[1].scores, expected.scores)
    assert (after[1].ious == 0).all()
    for detections in after:
        assert torch.isfinite(detections.boxes).all()
        assert torch.isfinite(detections.scores).all()
        assert torch.isfinite(detections.ious).all()
    assert stage.summary.unpredicted == len(candidates[1])
    assert f"{len(candidates[1]):,} boxes without a prediction" in str(stage.summary)


def test_boxes_that_are_not_finite_do_not_come_out(scene, head):
    features, candidates, _, _, _ = scene
    boxes = candidates[0].boxes.clone()
    boxes[0], boxes[1] = torch.nan, torch.tensor([5.0, 5, torch.inf, 9])
    out = Stage(head)(features, [candidates[0].replace(boxes=boxes), *candidates[1:]])
    assert torch.isfinite(out[0].boxes).all()


def test_boxes_stay_inside_the_image(scene, head):
    features, candidates, _, _, _ = scene
    for detections in Stage(head, ascent_step_size=5.0)(features, candidates):
        assert detections.boxes.min() >= 0
        assert detections.boxes.max() <= SIZE
        assert (detections.boxes[:, 2:] > detections.boxes[:, :2]).all()


def test_empty_images_and_limits(scene, head):
    features, candidates, _, _, _ = scene
    none = candidates[0][:0]
    out = Stage(head, max_detections=2)(features, [none, candidates[1], none])
    assert [len(d) for d in out] == [0, min(2, len(out[1])), 0]
    assert all(d.ious is not None for d in out)
    assert [len(d) for d in Stage(head)(features, [none] * 3)] == [0, 0, 0]
    stage = Stage(head, nms="none", final_nms="none", refine_topk=3)
    stage(features, candidates)
    assert stage.summary.refined == 9


def test_no_images_are_ordinary(head):
    features = FeatureMaps((torch.zeros(0, 4, 8, 8), torch.zeros(0, 4, 4, 4)), (1, 2), ())
    assert Stage(head)(features, []) == []


def test_candidates_of_too_few_images_are_refused(scene, head):
    with pytest.raises(ValueError, match="`candidates` needs one entry per image, got 2 for 3 images"):
        Stage(head)(scene.features, scene.candidates[:2])


def test_candidates_are_not_mutated(scene, head):
    features, candidates, _, _, _ = scene
    before = [d.boxes.clone() for d in candidates]
    Stage(head)(features, candidates)
    assert all(torch.equal(a, d.boxes) and d.ious is None for a, d in zip(before, candidates, strict=True))


def test_the_summary_counts_over_all_calls(scene, head):
    features, candidates, _, _, _ = scene
    stage = Stage(head)
    detections = [*stage(features, candidates), *stage(features, candidates)]
    assert stage.summary.images == 6
    assert stage.summary.candidates == 2 * sum(map(len, candidates))
    assert stage.summary.detections == sum(map(len, detections))
    assert str(stage.summary).startswith(f"6 images; {stage.summary.candidates:,} candidates in; ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nms": "guided"}, "`nms` must be one of 'iou_guided', 'greedy'"),
        ({"final_nms": "sofd"}, "`final_nms` must be one of .* Did you mean 'soft'"),
        ({"rank_by": "score"}, "`rank_by` must be one of 'ranking', 'iou'"),
        ({"ascent": "papers"}, "`ascent` must be one of .* Did you mean 'paper'"),
        ({"rank_alpha": 2}, r"`rank_alpha` must lie in \[0, 1\], got 2"),
        ({"nms_threshold": -0.1}, r"`nms_threshold` must lie in \[0, 1\], got -0.1"),
        ({"ascent_steps": -1}, "`ascent_steps` must be 0 or more, got -1"),
        ({"min_gain": float("nan")}, "`min_gain` must be 0 or more, got nan"),
        ({"ascent_step_size": float("nan")}, "`ascent_step_size`"),
        ({"max_detections": 0}, "`max_detections`"),
        ({"ascent_stepz": 3}, r"`setting` must be one of .*got 'ascent_stepz'. Did you mean 'ascent_steps'"),
    ],
)
def test_wrong_settings_are_named(head, wrong, message):
    with pytest.raises(ValueError, match=message):
        Stage(head, **wrong)


def test_the_oracle_is_exact(scene):
    gt_boxes = torch.cat(scene.gt_boxes)
    torch.testing.assert_close(paired_iou(gt_boxes, gt_boxes), torch.ones(len(gt_boxes)))
