"""Choose what the stage does with a head, on images the head was not trained on.

Whether refining boxes, ranking by IoU or changing scores helps depends on the detector: one whose class score already
knows the IoU has nothing to gain and can lose. So it is measured, one setting after another, and a setting is changed
only where AP rises by more than noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.progress import Progress, no_progress
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage

# Where the search starts: what a detector does by itself, written as IoU-guided NMS that ranks by the class score.
_START = StageSettings.detector_only().replace(nms="iou_guided", final_nms="iou_guided")
_SOFT: dict[str, Any] = {"nms": "iou_guided", "final_nms": "soft"}
# Tried in this order, each line from the best so far; within a line the cheaper and milder come first.
_TRIALS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, {"nms_threshold": 0.6}, {"nms_threshold": 0.7}, {"nms": "none", "final_nms": "none"}),
    (_SOFT | {"nms_threshold": 0.8}, _SOFT | {"nms": "none"}),
    ({"rank_alpha": 0.25}, {"rank_alpha": 0.5}, {"rank_alpha": 0.75}, {"rank_alpha": 1.0}),
    ({"regression_steps": 1}, {"regression_steps": 2}),
    ({"ascent_steps": 5, "ascent_step_size": 0.02}, {"ascent_steps": 5, "ascent_step_size": 0.05}),
    ({"score_alpha": 0.3}, {"score_alpha": 0.5}, {"score_alpha": 0.7}),
)
# A gain of AP below this is taken for noise, and the simpler setting stays.
_NOISE = 0.001


def choose_settings(
    head: IoUHead,
    source: FeatureSource,
    category_ids: Mapping[int, int] | None,
    ground_truth: GroundTruth,
    *,
    progress: Progress = no_progress,
) -> tuple[StageSettings, list[dict[str, Any]]]:
    """The settings of the stage with the highest AP, by coordinate search.

    Args:
        head: the trained head.
        source, category_ids, ground_truth: see :func:`dump_candidates`; images the head was not trained on.
        progress: called after each trial, in the phase "choosing settings".

    Returns:
        The settings, and a record of every trial with its AP and AP50.
    """
    candidates = Results.concat(dump_candidates(source, category_ids, ground_truth))
    record: list[dict[str, Any]] = []
    total = sum(map(len, _TRIALS))
    best, highest = _START, -1.0
    for trials in _TRIALS:
        start = best
        for trial in trials:
            settings = start.replace(**trial)
            parts = rescore(source, category_ids, Stage(head, settings), candidates, ground_truth)
            metrics = evaluate(Results.concat(parts), ground_truth).metrics
            record.append({**asdict(settings), "AP": metrics["AP"], "AP50": metrics["AP50"]})
            progress("choosing settings", len(record), total)
            if metrics["AP"] > highest + _NOISE:
                best, highest = settings, metrics["AP"]
    return best, record
