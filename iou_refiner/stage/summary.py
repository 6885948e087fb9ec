"""What became of the boxes that a stage was given: every one of them is counted. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Summary:
    """What a stage has done so far, over all images.

    Law: ``candidates == detections + suppressed + sum(dropped.values())``.

    Attributes:
        images: number of images.
        candidates: boxes that came in.
        detections: boxes that went out.
        refined: boxes that were tried to be moved.
        moved: boxes that were moved.
        undone: steps of the ascent undone because the prediction was not finite.
        unpredicted: boxes whose IoU could not be predicted (features or box not finite). They stay where they are, keep
            their class score, and leave with an IoU of 0: no evidence that they fit.
        untrained: boxes of categories that the head was not trained on. They get the detector's own suppression, keep
            their box and score, and leave with an IoU of 0.
        beyond: boxes dropped since their image has more than ``max_candidates``.
        not_finite: boxes dropped since a coordinate or the score is not finite.
        empty: boxes dropped since they have no width or no height.
        outside: boxes dropped since they lie outside of their image.
    """

    images: int = 0
    candidates: int = 0
    detections: int = 0
    refined: int = 0
    moved: int = 0
    undone: int = 0
    unpredicted: int = 0
    untrained: int = 0
    beyond: int = 0
    not_finite: int = 0
    empty: int = 0
    outside: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Boxes that no suppression removed and that are gone all the same, by the reason."""
        reasons = {"beyond max_candidates": self.beyond, "not finite": self.not_finite}
        return reasons | {"empty": self.empty, "outside the image": self.outside}

    @property
    def suppressed(self) -> int:
        """Boxes removed by a suppression, or beyond ``max_detections``."""
        return self.candidates - self.detections - sum(self.dropped.values())

    def drop(self, *, empty: int, outside: int) -> None:
        """Count boxes that the stage let out and that its caller has to leave out."""
        self.empty, self.outside = self.empty + empty, self.outside + outside
        self.detections -= empty + outside

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        names = ("images", "candidates", "detections", "refined", "moved", "undone", "unpredicted", "untrained")
        counts = asdict(self)
        return {name: counts[name] for name in names} | {"suppressed": self.suppressed, "dropped": self.dropped}

    def __str__(self) -> str:
        parts = [f"{self.images:,} images", f"{self.candidates:,} candidates in", f"{self.detections:,} detections out"]
        parts.append(f"{self.suppressed:,} suppressed")
        parts += dropped_in_words(self.dropped)
        if self.refined:
            parts.append(f"refined {self.refined:,}: {self.moved:,} moved, {self.refined - self.moved:,} left in place")
        if self.undone or self.unpredicted:
            parts.append(f"{self.undone:,} non-finite steps undone, {self.unpredicted:,} boxes without a prediction")
        if self.untrained:
            parts.append(f"{self.untrained:,} of categories the head was not trained on")
        return "; ".join(parts)


def dropped_in_words(dropped: Mapping[str, int]) -> list[str]:
    """How many boxes were dropped and why, one text; none where all counts are 0."""
    reasons = [f"{count:,} {reason}" for reason, count in dropped.items() if count]
    return [f"{sum(dropped.values()):,} dropped ({', '.join(reasons)})"] if reasons else []
