"""The settings of the stage: each preset and each suppression against a slow, plain composition of its parts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps, HeadConfig, IoUHead, Stage, StageSettings
from iou_refiner.boxes import clip_boxes
from iou_refiner.head.config import HeadMetadata
from iou_refiner.stage.ascent import refine_boxes_paper
from iou_refiner.stage.nms import iou_guided_nms, nms
from iou_refiner.stage.soft_nms import soft_nms
from tests.kit.fixtures import relabelled
from tests.kit.reference import iou_guided_nms_reference
from tests.kit.toys import SIZE, OracleHead, ToyDetector, ToyScene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ToyScene:
    """Boxes of two classes, which come at random."""
    return relabelled(make_scene(tmp_path_factory.mktemp("scene")), 2)


def opinionated_head(**config: Any) -> IoUHead:
    """A head whose predictions differ from box to box, as those of a fresh one do not."""
    head = IoUHead((4, 4), (1, 2), HeadConfig(width=3, hidden=(16,), output_size=3, **config)).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.4)
    return head


# ---- What a detector does by itself. ----


def assert_same(ours: list[Detections], theirs: list[Detections]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.labels, other.labels)


def test_detector_only_is_the_detectors_own_suppression(scene: ToyScene) -> None:
    stage = Stage(opinionated_head(), StageSettings.detector_only())
    own = ToyDetector.own_suppression(scene.features, scene.candidates)
    assert_same(stage(scene.features, scene.candidates), own)
    assert stage.summary.refined == 0
    assert not StageSettings.detector_only().refines


_grid = st.integers(0, 6).map(float)
_rows = st.lists(
    st.tuples(st.tuples(_grid, _grid, _grid, _grid), st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 2)), max_size=12
)


@given(images=st.lists(_rows, min_size=1, max_size=3), threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_detector_only_is_greedy_nms_with_ties_and_empty_boxes_too(images: list[Any], threshold: float) -> None:
    levels = (torch.rand(len(images), 4, 8, 8), torch.rand(len(images), 4, 4, 4))
    features = FeatureMaps(levels, (1, 2), ((8, 8),) * len(images))
    candidates = [
        Detections(
            torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
            torch.tensor([score for _, score, _ in rows]),
            torch.tensor([label for _, _, label in rows], dtype=torch.int64),
        )
        for rows in images
    ]
    stage = Stage(opinionated_head(), StageSettings.detector_only(nms_threshold=threshold))
    expected = [d[nms(d.boxes, d.scores, d.labels, threshold=threshold)] for d in candidates]
    assert_same(stage(features, candidates), expected)


# ---- The paper's pipeline. ----


def test_the_papers_pipeline_is_its_two_algorithms_one_after_the_other(scene: ToyScene) -> None:
    """Image by image, class by class, and in the ascent box by box."""
    features, candidates, _, _, _ = scene
    head = opinionated_head()
    table = head.encode(features)
    stage = Stage(head, StageSettings.paper())
    moved = 0
    for index, (before, detections) in enumerate(zip(candidates, stage(features, candidates), strict=True)):
        image = torch.full((len(before),), index)
        iou = head.predict(table, before.boxes, image, before.labels).iou
        rows: list[tuple[float, int]] = []  # the score of each cluster, and the row of the box that stands for it
        for label in (1, 2):
            of_class = torch.nonzero(before.labels == label).flatten()
            boxes, scores = before.boxes[of_class], before.scores[of_class]
            keep, merged = iou_guided_nms(boxes, scores, iou[of_class], threshold=0.5)
            columns = [tuple(box) for box in boxes.tolist()], scores.tolist(), iou[of_class].tolist()
            printed = iou_guided_nms_reference(*columns, [label] * len(boxes), 0.5)
            assert printed == list(zip(keep.tolist(), merged.tolist(), strict=True))
            rows += [(score, int(of_class[row])) for row, score in printed]
        rows.sort(key=lambda entry: -entry[0])
        assert len(detections) == len(rows)
        torch.testing.assert_close(detections.scores, torch.tensor([score for score, _ in rows]), rtol=0, atol=0)
        assert torch.equal(detections.labels, before.labels[[row for _, row in rows]])
        for place, (_, row) in enumerate(rows):
            box = before.boxes[row : row + 1]
            level = head.finest_level(box)

            def score(point: Tensor, _: Tensor, image: Tensor = image[:1], level: Tensor = level) -> Tensor:
                return head(table, point, image, level=level).iou

            end = refine_boxes_paper(score, box, steps=5, step_size=0.5, early_stop=0.001, degeneration=-0.01).boxes
            end = clip_boxes(end, (SIZE, SIZE))
            torch.testing.assert_close(detections.boxes[place], end[0], rtol=1e-4, atol=1e-3)
            expected = head.predict(table, end, image[:1]).iou[0]
            torch.testing.assert_close(detections.ious[place], expected, rtol=1e-4, atol=1e-4)
            moved += int(not torch.allclose(end, box, atol=0.05))
    assert moved > 5
    assert stage.summary.moved >= moved


def test_the_papers_ascent_keeps_the_worse_position_as_printed(scene: ToyScene) -> None:
    features, candidates, gt_boxes, _, _ = scene
    still = StageSettings.paper().replace(nms="none", ascent_steps=0)
    oracle = OracleHead(gt_boxes)
    before = Stage(oracle, still)(features, candidates)
    after = Stage(oracle, still, ascent_steps=1, ascent_step_size=20.0)(features, candidates)
    assert any((new.ious < old.ious - 0.01).any() for new, old in zip(after, before, strict=True))


# ---- The two suppressions. ----


class Shifting(OracleHead):
    """Knows how well boxes fit, ranks them a little otherwise, and regresses all of them to the right."""

    def __init__(self, gt_boxes: list[Tensor]):
        super().__init__(gt_boxes)
        self.config = replace(self.config, deltas=True)

    def forward(self, table: Any, boxes: Tensor, *args: Any) -> Any:
        prediction = super().forward(table, boxes, *args)
        return prediction._replace(ranking=(prediction.iou * (0.8 + 0.2 * torch.sin(boxes.sum(1)))).clamp(0, 1))

    def regress(self, table: Any, boxes: Tensor, image_index: Tensor, labels: Any = None) -> Tensor:
        return boxes + boxes.new_tensor([3.0, 0, 3, 0])


def suppressed(kind: str, detections: Detections, ranking: Tensor, threshold: float) -> tuple[Detections, Tensor]:
    """One suppression of one image, and the ranking of what is left; both rank by the root of score and ranking."""
    rank = (detections.scores * ranking).sqrt()
    if kind == "none":
        return detections, ranking
    if kind == "soft":
        keep, decayed = soft_nms(detections.boxes, rank, detections.labels)
        return detections[keep].replace(scores=detections.scores[keep] * decayed / rank[keep]), ranking[keep]
    if kind == "greedy":
        keep = nms(detections.boxes, detections.scores, detections.labels, threshold=threshold)
        return detections[keep], ranking[keep]
    columns = detections.boxes, detections.scores, rank, detections.labels
    keep, merged = iou_guided_nms(*columns, threshold=threshold)
    return detections[keep].replace(scores=merged), ranking[keep]


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("final_nms", ["soft", "iou_guided", "greedy", "none"])
@pytest.mark.parametrize("nms", ["iou_guided", "greedy", "none"])
def test_one_suppression_before_refinement_and_one_after_it(
    scene: ToyScene, nms: str, final_nms: str, refine: bool
) -> None:
    features, candidates, gt_boxes, _, _ = scene
    settings = StageSettings(
        nms=nms, final_nms=final_nms, nms_threshold=0.6, rank_alpha=0.5, regression_steps=int(refine), ascent_steps=0,
        refine_topk=8, score_alpha=0.0, max_detections=15,
    )  # fmt: skip
    head = Shifting(gt_boxes)
    for index, detections in enumerate(Stage(head, settings)(features, candidates)):

        def predict(boxes: Tensor, index: int = index) -> Any:
            return head.predict(None, boxes, torch.full((len(boxes),), index))

        left, ranking = suppressed(nms, candidates[index], predict(candidates[index].boxes).ranking, 0.6)
        if refine:
            order = left.scores.argsort(descending=True, stable=True)
            left, ranking = left[order], ranking[order]
            boxes = left.boxes.clone()
            for row in range(min(8, len(left))):
                moved = clip_boxes(head.regress(None, boxes[row : row + 1], None), (SIZE, SIZE))
                gained = predict(moved).ranking[0] > ranking[row] and bool((moved[:, 2:] > moved[:, :2]).all())
                if gained:
                    boxes[row], ranking[row] = moved[0], predict(moved).ranking[0]
            left = left.replace(boxes=boxes)
        if refine or final_nms == "soft":  # where nothing was refined, no other follows
            left, ranking = suppressed(final_nms, left, ranking, 0.6)
        expected = left[left.scores.argsort(descending=True, stable=True)[:15]]
        torch.testing.assert_close(detections.scores, expected.scores)
        torch.testing.assert_close(detections.boxes, expected.boxes)
        torch.testing.assert_close(detections.ious, predict(expected.boxes).iou)


# ---- The record itself. ----


def test_presets_and_changes_leave_the_rest_as_it_was() -> None:
    assert StageSettings().replace() == StageSettings()
    assert StageSettings().replace(nms=None, rank_alpha=None) == StageSettings()
    changed = StageSettings.paper().replace(rank_alpha=0.25, nms=None)
    assert asdict(changed) == {**asdict(StageSettings.paper()), "rank_alpha": 0.25}
    assert StageSettings.detector_only(nms_threshold=0.7).nms_threshold == 0.7
    with pytest.raises(ValueError, match=r"`rank_alpha` must lie in \[0, 1\], got 3"):
        StageSettings().replace(rank_alpha=3)
    with pytest.raises(ValueError, match="Did you mean 'nms_threshold'"):
        StageSettings().replace(nms_treshold=0.5)


def test_what_moves_boxes_is_known() -> None:
    assert StageSettings().refines
    assert StageSettings.paper().refines
    assert not StageSettings(refine_topk=0).refines
    assert not StageSettings(regression_steps=0, ascent_steps=0).refines


def test_a_head_without_deltas_takes_no_step_of_regression() -> None:
    head = opinionated_head(deltas=False)
    assert Stage(head).settings == StageSettings(regression_steps=0)
    assert not Stage(head, ascent_steps=0).settings.refines


def test_the_head_recommends_unless_settings_are_given() -> None:
    head = opinionated_head()
    head.metadata = HeadMetadata(recommended=asdict(StageSettings.paper()))
    assert Stage(head).settings == StageSettings.paper()
    assert Stage(head, StageSettings()).settings == StageSettings()
    assert Stage(head, score_alpha=0.5, nms=None).settings == StageSettings.paper().replace(score_alpha=0.5)
    head.metadata = HeadMetadata(recommended={"colour": "red"})
    with pytest.raises(ValueError, match=r"`setting` must be one of .* got 'colour'"):
        Stage(head)


@pytest.mark.parametrize("module", ["iou_refiner.stage.settings", "iou_refiner.training.settings"])
def test_settings_need_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
