"""What a stage does, in the order in which it does it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from iou_refiner.checks import check_choice, check_fraction, check_positive
from iou_refiner.head.iou_head import IoUPredictor


@dataclass(frozen=True)
class StageSettings:
    """Suppress, move, suppress again, rescore. The defaults measured best on a detector whose class score knows
    nothing of fit (docs/accuracy.md); ``train --val-ann`` finds what suits another.

    Args:
        nms: ``"iou"`` suppresses by what boxes are worth (Algorithm 1), ``"greedy"`` by class score; both again after
            boxes have moved, for boxes that have come to rest on one object are one detection. ``"soft"`` is ``"iou"``,
            then decays the scores of what still overlaps once it has moved (Soft-NMS); with ``nms_threshold=1`` that
            alone. ``"none"`` keeps every box, for detectors without duplicates and files already suppressed.
        nms_threshold: IoU above which boxes of one class are one cluster.
        rank_alpha: suppression ranks by ``score^(1 - rank_alpha) * worth^rank_alpha``, with
            :meth:`IoUPredictor.worth`: the energy, or the predicted IoU of a head that has none. 1 is Algorithm 1.
        moves: steps of regression, before the ascent (:meth:`IoUPredictor.move`; a head that does not regress takes
            none).
        steps: steps of the ascent on the worth; 0 takes none.
        step_size: see :func:`refine_boxes`.
        margin: a box that all its moves together do not make worth more by this stays where it was.
        refine_top: boxes moved per image, best scores first.
        score_alpha: detections are scored ``score^(1 - score_alpha) * iou^score_alpha``; 0 leaves the class score.
        max_detections: detections per image.

    Raises:
        ValueError: a setting is out of range.
    """

    nms: str = "soft"
    nms_threshold: float = 0.8
    rank_alpha: float = 0.5
    moves: int = 1
    steps: int = 5
    step_size: float = 0.05
    margin: float = 0.0
    refine_top: int = 100
    score_alpha: float = 0.3
    max_detections: int = 100

    def __post_init__(self) -> None:
        check_choice("nms", self.nms, ["iou", "greedy", "soft", "none"])
        check_positive("step_size", self.step_size)
        check_positive("max_detections", self.max_detections)
        for name in ("nms_threshold", "rank_alpha", "score_alpha"):
            check_fraction(name, getattr(self, name))
        for name in ("moves", "steps", "refine_top", "margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")

    @classmethod
    def of(cls, head: IoUPredictor, **changes: Any) -> StageSettings:
        """The settings recommended for a head, with some exchanged; a change to None is no change."""
        known = [field.name for field in fields(cls)]
        for name in changes:
            check_choice("setting", name, known)
        wanted = {name: value for name, value in changes.items() if value is not None}
        return cls(**{**head.recommended, **wanted})
