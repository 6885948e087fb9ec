"""What the demo measured, as a table and as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from iou_refiner.demo.data import WHAT_IT_IS
from iou_refiner.evaluation.agreement import Agreement
from iou_refiner.evaluation.bootstrap import Comparison
from iou_refiner.evaluation.tables import Table

_SHOWN = ("AP", "AP50", "AP75", "AP90")


@dataclass(frozen=True, repr=False)
class DemoResult(Table):
    """What the demo measured on images that neither detector nor head had seen.

    Args:
        comparisons: per name of a stage, the detector alone (before) and with it (after).
        class_score: how well the class score of a candidate follows its true IoU.
        predicted_iou: how well the predicted IoU does.
    """

    comparisons: Mapping[str, Comparison]
    class_score: Agreement
    predicted_iou: Agreement

    @property
    def caption(self) -> str:
        """What the data is, and how well score and predicted IoU follow the true IoU."""
        images = self.comparisons["the default"].before.images
        return (
            f"Data: {WHAT_IT_IS}. {images:,} test images.\n"
            f"Correlation with the true IoU, over the {self.predicted_iou.count:,} candidates above IoU 0.5: "
            f"class score {self.class_score.pearson:.2f}, predicted IoU {self.predicted_iou.pearson:.2f}."
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return ("", "with", "before", "after", "difference", "95 % interval")

    def rows(self) -> list[tuple[str, ...]]:
        """One row per metric and stage, in points; the metric is named in the first of its rows."""
        tables = {name: {row[0]: row[1:] for row in c.rows()} for name, c in self.comparisons.items()}
        return [
            (metric if index == 0 else "", name, *rows[metric])
            for metric in _SHOWN
            for index, (name, rows) in enumerate(tables.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, fractions in [0, 1]."""
        return {
            "data": WHAT_IT_IS,
            "comparisons": {name: comparison.to_dict() for name, comparison in self.comparisons.items()},
            "class_score": self.class_score.to_dict(),
            "predicted_iou": self.predicted_iou.to_dict(),
        }
