"""Choose what the stage does with a head, on images the head was not trained on.

Whether moving boxes, ranking by IoU or changing scores helps depends on the detector: one whose class score already
knows the IoU has nothing to gain and can lose. So it is measured, one setting after another, and a setting is changed
only where AP rises by more than a trifle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.rescoring import Look, dump_candidates, rescore
from iou_refiner.stage.stage import Stage

# Greedy NMS by class score, nothing moved, nothing rescored: what a detector does by itself.
_NOTHING: dict[str, Any] = {
    "nms": "iou", "nms_threshold": 0.5, "rank_alpha": 0.0, "score_alpha": 0.0, "moves": 0, "steps": 0,
}  # fmt: skip
# Tried in this order, each line from the best found so far; within a line the cheaper and milder come first.
_TRIALS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, {"nms_threshold": 0.6}, {"nms_threshold": 0.7}, {"nms": "none"}),
    ({"nms": "soft", "nms_threshold": 0.8}, {"nms": "soft", "nms_threshold": 1.0}),
    ({"rank_alpha": 0.25}, {"rank_alpha": 0.5}, {"rank_alpha": 0.75}, {"rank_alpha": 1.0}),
    ({"moves": 1}, {"moves": 2}),
    ({"steps": 5, "step_size": 0.02}, {"steps": 5, "step_size": 0.05}),
    ({"score_alpha": 0.3}, {"score_alpha": 0.5}, {"score_alpha": 0.7}),
)
# A gain of AP below this is taken for noise, and the simpler setting stays.
_TRIFLE = 0.001


def choose_settings(
    head: IoUPredictor,
    look: Look,
    category_ids: Mapping[int, int] | None,
    ground_truth: GroundTruth,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings of :class:`Stage` with the highest AP, by coordinate search.

    Args:
        head: the trained head.
        look, category_ids, ground_truth: see :func:`dump_candidates`; images the head was not trained on.
        progress: called with ("choosing settings", trials done, trials in all).

    Returns:
        The settings, and a record of every trial with its AP and AP50.
    """
    candidates = Results.concat(dump_candidates(look, category_ids, ground_truth))
    record: list[dict[str, Any]] = []
    total = sum(map(len, _TRIALS))

    def ap(settings: dict[str, Any]) -> float:
        parts = rescore(look, category_ids, Stage(head, **settings), candidates, ground_truth)
        metrics = evaluate(Results.concat(parts), ground_truth).metrics
        record.append({**settings, "AP": metrics["AP"], "AP50": metrics["AP50"]})
        if progress:
            progress("choosing settings", len(record), total)
        return metrics["AP"]

    best, highest = _NOTHING, -1.0
    for trials in _TRIALS:
        start = best
        for trial in trials:
            value = ap(start | trial)
            if value > highest + _TRIFLE:
                best, highest = start | trial, value
    return best, record
