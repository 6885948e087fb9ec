"""Choose what the stage does with a head, on images the head was not trained on.

Whether judging by siblings, refining boxes, ranking by IoU or changing scores helps depends on the detector: one whose
class score already knows the IoU has nothing to gain and can lose. So it is measured, and a setting is changed only
where AP rises by more than noise. What came out best of several looks better than it is, and on few images by much: so
it replaces the detector's own behaviour only where the 95 % interval of its gain lies above zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.evaluation.ap import evaluate, or_none, points
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.head.checkpoint import Head
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.progress import Progress, no_progress
from iou_refiner.stage.settings import StageSettings
from iou_refiner.training.before import FEW_VAL_IMAGES

#: Puts the validation images through a stage of these settings.
Run = Callable[[StageSettings], Results]

# By siblings: a head with a network over them has little to search.
_MOVES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Tried beside them where the head reads features: the defaults by the predicted IoU, without and with the ascent.
_BY_IOU = (StageSettings(ascent_steps=0), StageSettings())
# By the predicted IoU: where the search starts, which is what a detector does by itself, written as IoU-guided NMS that
# ranks by the class score.
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

    def keep_in(self, head: Head) -> None:
        """Keep settings, trials and numbers in the head's metadata."""
        about = head.metadata
        measured = {name: or_none(value) for name, value in self.metrics().items()}
        head.metadata = replace(
            about,
            recommended=asdict(self.settings),
            trials=tuple(self.trials),
            metrics={**about.metrics, **measured},
        )

    def say(self, images: int, note: Callable[[str], None]) -> None:
        """Tell what was chosen on so many images, and how far that can be trusted."""
        note("Chosen on the validation images: " + ", ".join(f"{k} {v}" for k, v in asdict(self.settings).items()))
        if images < FEW_VAL_IMAGES:
            note(
                f"The validation set is small ({images} images, about {FEW_VAL_IMAGES} or more are needed): what was "
                "chosen on it, and its AP, may turn out otherwise on other images."
            )
        note(str(self))

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
    head: Head,
    run: Run,
    ground_truth: GroundTruth,
    *,
    own_threshold: float | None = 0.5,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Choice:
    """The settings of the stage with the highest AP, where they surely gain.

    A head with a network over siblings is tried with that, in five to seven passes over the images; another one by a
    coordinate search over everything else, in eighteen.

    Args:
        head: the trained head.
        run: gives the results of settings, on images the head was not trained on.
        ground_truth: their annotation.
        own_threshold: of the detector's own greedy NMS, see :class:`Stage`.
        seed: of the bootstrap.
        progress: called after each trial, in the phase "choosing settings".
    """
    by_siblings = [StageSettings.by_siblings(move=move) for move in _MOVES]
    by_siblings += _BY_IOU if isinstance(head, IoUHead) else ()
    search = _Search(run, ground_truth, 1 + (len(by_siblings) if head.siblings else sum(map(len, _TRIALS))), progress)
    own = own_behaviour(own_threshold)
    before, before_ap = search.tried(own)
    if head.siblings:
        search.better(by_siblings)
    else:
        for trials in _TRIALS:
            start = search.best
            search.better([start.replace(**trial) for trial in trials])
    interval = compare(before, search.results or before, ground_truth, seed=seed).intervals["AP"]
    sure = interval[0] > 0
    return Choice(search.best if sure else own, search.record, before_ap, search.highest, interval, sure)


class _Search:
    """The best settings so far, and all that were tried."""

    def __init__(self, run: Run, ground_truth: GroundTruth, total: int, progress: Progress):
        self._run, self._ground_truth, self._total, self._progress = run, ground_truth, total, progress
        self.record: list[dict[str, Any]] = []
        self.best, self.highest = _START, -1.0
        self.results: Results | None = None

    def tried(self, settings: StageSettings) -> tuple[Results, float]:
        results = self._run(settings)
        metrics = evaluate(results, self._ground_truth).metrics
        self.record.append({**asdict(settings), "AP": metrics["AP"], "AP50": metrics["AP50"]})
        self._progress("choosing settings", len(self.record), self._total)
        return results, metrics["AP"]

    def better(self, trials: list[StageSettings]) -> None:
        """Try each, and keep the best where it is better by more than noise."""
        for settings in trials:
            results, ap = self.tried(settings)
            if ap > self.highest + _NOISE:
                self.best, self.results, self.highest = settings, results, ap
