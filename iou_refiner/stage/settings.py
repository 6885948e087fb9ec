"""The settings of the stage, in the order in which it acts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from iou_refiner.checks import check_choice, check_number, check_positive

# Beyond these a typo would run for hours; nothing is gained there.
_MOST: dict[str, float] = {
    "regression_steps": 100, "ascent_steps": 1000, "ascent_step_size": 1e6, "min_gain": 1e6, "refine_topk": 10**7,
    "max_detections": 10**7, "max_candidates": 10**7,
}  # fmt: skip


@dataclass(frozen=True)
class StageSettings:
    """Suppress, refine, suppress again, rescore.

    The defaults measured best on a detector whose class score knows nothing about localization (docs/accuracy.md);
    ``train --val-ann`` finds what suits another detector. Soft-NMS alone is ``nms="none"`` with ``final_nms="soft"``.

    Args:
        nms: suppression before boxes are refined: "iou_guided" keeps the best-ranked box of each cluster, with the
            cluster's highest class score (Algorithm 1 of the paper), "greedy" the box of the highest class score,
            "none" all boxes.
        nms_threshold: IoU above which boxes of one class are one cluster.
        final_nms: suppression after boxes were refined: "soft" decays the scores of boxes that still overlap
            (Soft-NMS), the others as ``nms``, and only where boxes were refined.
        rank_by: what IoU-guided NMS ranks by and the ascent climbs: the head's "ranking", or the predicted "iou".
        rank_alpha: suppression ranks by score^(1 - a) * r^a, where r is ``rank_by``; 1 is the paper's.
        regression_steps: steps of box regression, before the ascent; a head without deltas takes none.
        ascent: "backtracking" undoes steps that fail and moves in units of the box; "paper" is Algorithm 2 as printed,
            in pixels, and leaves every box where it ends.
        ascent_steps: steps of the ascent.
        ascent_step_size: length of the first step, per unit of gradient.
        min_gain: a refined box returns to where it was unless its ranking rises by more than this.
        refine_topk: boxes refined per image, best scores first.
        score_alpha: detections are scored score^(1 - a) * iou^a; 0 leaves the class score.
        max_detections: detections kept per image, over all classes.
        max_candidates: candidates taken of each image, best scores first; more would take minutes, and are counted.
        all_categories: apply the head to categories that it was not trained on too, instead of leaving these to the
            detector's own suppression. A head that records no categories takes all.
        siblings: judge the survivors of the detector's kind of suppression by their siblings, in the place of all steps
            above up to ``final_nms``. Needs a head with a network over siblings.
        sibling_move: share of the network's deltas by which boxes are then moved.

    Raises:
        ValueError: a setting is out of range.
    """

    nms: Literal["iou_guided", "greedy", "none"] = "iou_guided"
    nms_threshold: float = 0.8
    final_nms: Literal["soft", "iou_guided", "greedy", "none"] = "soft"
    rank_by: Literal["ranking", "iou"] = "ranking"
    rank_alpha: float = 0.5
    regression_steps: int = 1
    ascent: Literal["backtracking", "paper"] = "backtracking"
    ascent_steps: int = 5
    ascent_step_size: float = 0.05
    min_gain: float = 0.0
    refine_topk: int = 100
    score_alpha: float = 0.3
    max_detections: int = 100
    max_candidates: int = 10_000
    all_categories: bool = False
    siblings: bool = False
    sibling_move: float = 0.5

    def __post_init__(self) -> None:
        check_choice("nms", self.nms, ["iou_guided", "greedy", "none"])
        check_choice("final_nms", self.final_nms, ["soft", "iou_guided", "greedy", "none"])
        check_choice("rank_by", self.rank_by, ["ranking", "iou"])
        check_choice("ascent", self.ascent, ["backtracking", "paper"])
        for name in ("ascent_step_size", "max_detections", "max_candidates"):
            check_positive(name, getattr(self, name))
        for name in ("nms_threshold", "rank_alpha", "score_alpha", "sibling_move"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("regression_steps", "ascent_steps", "min_gain", "refine_topk"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        for name, most in _MOST.items():
            check_number(name, getattr(self, name), 0, most, whole=name not in ("ascent_step_size", "min_gain"))
        for name in ("all_categories", "siblings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")

    @classmethod
    def detector_only(cls, *, nms_threshold: float = 0.5) -> StageSettings:
        """What a detector does by itself: greedy NMS by class score, nothing refined, nothing rescored."""
        return cls(
            nms="greedy", nms_threshold=nms_threshold, final_nms="none", rank_alpha=0.0,
            regression_steps=0, ascent_steps=0, score_alpha=0.0,
        )  # fmt: skip

    @classmethod
    def paper(cls) -> StageSettings:
        """The pipeline of the paper (Jiang et al., ECCV 2018): IoU-guided NMS by the predicted IoU (Algorithm 1), then
        five steps of its optimization-based refinement (Algorithm 2)."""
        return cls(
            nms="iou_guided", nms_threshold=0.5, final_nms="none", rank_by="iou", rank_alpha=1.0,
            regression_steps=0, ascent="paper", ascent_steps=5, ascent_step_size=0.5, score_alpha=0.0,
        )  # fmt: skip

    @classmethod
    def by_siblings(cls, *, move: float = 0.5) -> StageSettings:
        """The survivors of suppression judged by their siblings, and nothing else."""
        return cls.detector_only().replace(nms="none", siblings=True, sibling_move=move)

    def replace(self, **changes: Any) -> StageSettings:
        """A copy with some settings exchanged; a change to None is no change.

        Raises:
            ValueError: a setting is unknown, or out of range.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            check_choice("setting", name, known)
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def refines(self) -> bool:
        """Whether boxes may come out elsewhere than they went in."""
        if self.siblings:
            return self.sibling_move > 0
        return self.refine_topk > 0 and (self.regression_steps > 0 or self.ascent_steps > 0)
