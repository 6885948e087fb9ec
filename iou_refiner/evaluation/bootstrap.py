"""The interval of a difference in AP, by a paired bootstrap over images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from iou_refiner.checks import check_positive
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.data import FloatArray
from iou_refiner.evaluation.ap import METRICS, Evaluation, check, match, or_none, plain, points, summary
from iou_refiner.evaluation.resampling import curves, interval, resampled_metrics
from iou_refiner.evaluation.tables import Table

MOST_RESAMPLES = 100_000  # from a few thousand on, the ends of an interval move by less than they show


@dataclass(frozen=True, repr=False)
class Comparison(Table):
    """Two sets of detections of the same images, and how sure their difference is.

    Args:
        before: the numbers of the first set.
        after: the numbers of the second.
        intervals: 95 % interval ``(low, high)`` of after minus before per metric; NaN where it cannot be had.
        resamples: how many resamples of the images the intervals rest on.
        seed: what the resamples were drawn with.
    """

    before: Evaluation
    after: Evaluation
    intervals: Mapping[str, tuple[float, float]]
    resamples: int
    seed: int

    @property
    def differences(self) -> dict[str, float]:
        """After minus before, per metric."""
        return {name: value - self.before.metrics[name] for name, value in self.after.metrics.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return ("", "before", "after", "difference", "95 % interval")

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """A row ("AP", "17.9", "20.1", "+2.2", "[+1.5, +2.9]") per metric, in points; "-" for what cannot be had."""
        table = []
        for name, difference in self.differences.items():
            low, high = self.intervals[name]
            spread = "-" if np.isnan(low) else f"[{points(low, '+')}, {points(high, '+')}]"
            sides = points(self.before.metrics[name]), points(self.after.metrics[name])
            table.append((name, *sides, points(difference, "+"), spread))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, fractions in [0, 1]; None for what cannot be had."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "differences": plain(self.differences),
            "intervals": {name: [or_none(low), or_none(high)] for name, (low, high) in self.intervals.items()},
            "resamples": self.resamples,
            "seed": self.seed,
        }


def compare(
    before: Results,
    after: Results,
    ground_truth: GroundTruth,
    *,
    resamples: int = 1000,
    seed: int = 0,
    max_dets: int = 100,
) -> Comparison:
    """Measure two sets of detections, and the 95 % interval of their difference by a paired bootstrap over images.

    Each resample draws as many images as there are, with replacement, and measures both sets on the same draw. A
    category without an object in a draw does not count in it, as in pycocotools.

    Args:
        before, after, ground_truth, max_dets: as in :func:`iou_refiner.evaluation.ap.evaluate`.
        resamples: number of draws; 0 leaves the intervals NaN.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        DataError: as :func:`iou_refiner.evaluation.ap.evaluate`; the message names ``before`` or ``after``.
        ValueError: ``max_dets`` is not positive, or ``resamples`` is negative or above 100,000.
    """
    check_positive("max_dets", max_dets)
    if resamples < 0:
        raise ValueError(f"`resamples` must not be negative, got {resamples}.")
    if resamples > MOST_RESAMPLES:
        raise ValueError(f"`resamples` must be at most {MOST_RESAMPLES:,}, got {resamples}.")
    check(ground_truth, before=before, after=after)
    sides = [
        Resampled.of(match(results, ground_truth, max_dets), len(results), resamples, seed)
        for results in (before, after)
    ]
    return difference(sides[0], sides[1])


@dataclass(frozen=True, eq=False)
class Resampled:
    """One set of detections, measured on all images and on random draws of them.

    Attributes:
        evaluation: on all images.
        draws: of each metric (resamples,).
        resamples, seed: the draws; one seed draws the same images for every set of detections.
    """

    evaluation: Evaluation
    draws: dict[str, FloatArray]
    resamples: int
    seed: int

    @classmethod
    def of(cls, evaluator: COCOeval, records: int, resamples: int, seed: int) -> Resampled:
        """What :func:`iou_refiner.evaluation.ap.match` returned for so many records."""
        evaluation = summary(evaluator, records)
        return cls(
            evaluation, resampled_metrics(curves(evaluator), evaluation.images, resamples, seed), resamples, seed
        )


def difference(before: Resampled, after: Resampled) -> Comparison:
    """Two sets of detections of the same images, measured with the same draws."""
    intervals = {name: interval(after.draws[name] - before.draws[name]) for name in METRICS}
    return Comparison(before.evaluation, after.evaluation, intervals, before.resamples, before.seed)
