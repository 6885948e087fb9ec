"""Choose what the stage does with a head, on images the head was not trained on.

Whether refining boxes, ranking by IoU or changing scores helps depends on the detector: one whose class score already
knows the IoU has nothing to gain and can lose. So it is measured, one setting after another, and a setting is changed
only where AP rises by more than noise. What came out best of twenty looks better than it is, and on few images by much:
so it replaces the detector's own behaviour only where the 95 % interval of its gain lies above zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.evaluation.ap import evaluate, points
from iou_refiner.evaluation.bootstrap import compare
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


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        settings: what the stage is to do: what measured best, or the detector's own behaviour where the gain of the
            best is not sure.
        trials: each of the settings tried, the detector's own behaviour first, with its AP and AP50.
        before, best: AP on val of the detector's own behaviour, and of what measured best.
        interval: 95 % interval of the difference, by a paired bootstrap over images; NaN where it cannot be had.
        sure: whether the interval lies above 0.
    """

    settings: StageSettings
    trials: list[dict[str, Any]]
    before: float
    best: float
    interval: tuple[float, float]
    sure: bool

    @property
    def after(self) -> float:
        """AP on val of the settings chosen."""
        return self.best if self.sure else self.before

    def metrics(self) -> dict[str, float]:
        """The numbers, by name."""
        low, high = self.interval
        names = ("val_AP_detector", "val_AP_chosen", "val_AP_best", "val_AP_gain_low", "val_AP_gain_high")
        return dict(zip(names, (self.before, self.after, self.best, low, high), strict=True))

    def __str__(self) -> str:
        low, high = self.interval
        spread = f"[{points(low, '+')}, {points(high, '+')}]"
        if self.sure:
            return f"val AP {points(self.before)} -> {points(self.best)} {spread}"
        return (
            f"val AP {points(self.before)} -> {points(self.before)}: the detector's own behaviour is recommended, "
            f"since the gain of what measured best ({points(self.best)}) is not sure: {spread} includes 0. More "
            "validation images, or more training, may make it so."
        )


def own_behaviour(nms_threshold: float | None) -> StageSettings:
    """What a detector with this threshold of greedy NMS does by itself; None for a detector without NMS."""
    if nms_threshold is None:
        return StageSettings.detector_only().replace(nms="none")
    return StageSettings.detector_only(nms_threshold=nms_threshold)


def choose_settings(
    head: IoUHead,
    source: FeatureSource,
    category_ids: Mapping[int, int] | None,
    ground_truth: GroundTruth,
    *,
    own_threshold: float | None = 0.5,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Choice:
    """The settings of the stage with the highest AP by coordinate search, where they surely gain.

    Args:
        head: the trained head.
        source, category_ids, ground_truth: see :func:`dump_candidates`; images the head was not trained on.
        own_threshold: of the detector's own greedy NMS, see :class:`Stage`.
        seed: of the bootstrap.
        progress: called after each trial, in the phase "choosing settings".
    """
    candidates = Results.concat(dump_candidates(source, category_ids, ground_truth))
    record: list[dict[str, Any]] = []
    total = 1 + sum(map(len, _TRIALS))

    def tried(settings: StageSettings) -> tuple[Results, float]:
        stage = Stage(head, settings, own_threshold=own_threshold)
        results = Results.concat(rescore(source, category_ids, stage, candidates, ground_truth))
        metrics = evaluate(results, ground_truth).metrics
        record.append({**asdict(settings), "AP": metrics["AP"], "AP50": metrics["AP50"]})
        progress("choosing settings", len(record), total)
        return results, metrics["AP"]

    own = own_behaviour(own_threshold)
    before, before_ap = tried(own)
    best, after, highest = _START, before, -1.0
    for trials in _TRIALS:
        start = best
        for trial in trials:
            settings = start.replace(**trial)
            results, ap = tried(settings)
            if ap > highest + _NOISE:
                best, after, highest = settings, results, ap
    interval = compare(before, after, ground_truth, seed=seed).intervals["AP"]
    sure = interval[0] > 0
    return Choice(best if sure else own, record, before_ap, highest, interval, sure)
