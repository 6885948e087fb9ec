"""Everything a report states, measured: one matching of each side serves all of it. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from iou_refiner.checks import check_number, check_positive
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.data import FloatArray
from iou_refiner.evaluation.ap import check, match
from iou_refiner.evaluation.bootstrap import MOST_RESAMPLES, Comparison, Resampled, difference
from iou_refiner.evaluation.true_iou import true_iou
from iou_refiner.files import finite
from iou_refiner.progress import Progress, no_progress
from iou_refiner.reporting.errors import Errors, find_errors
from iou_refiner.reporting.fit import Calibration, Fit, calibrate, fit
from iou_refiner.reporting.matching import Matching, image_ap
from iou_refiner.reporting.verdict import Verdict, verdict_of

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclass(frozen=True, eq=False)
class Side:
    """What is measured of one set of detections.

    Args:
        matching: which detection hit which object.
        errors: by kind.
        ap_at: (10,) AP at each IoU threshold of :data:`THRESHOLDS`, a fraction; NaN where there is no object.
        ap_of_image: (images,) AP of each image alone, by ascending id; NaN without objects.
        fits: score, and predicted IoU where records have it, against true IoU.
        calibration: of the score; None where scores lie outside [0, 1].
    """

    matching: Matching
    errors: Errors
    ap_at: FloatArray
    ap_of_image: FloatArray
    fits: tuple[Fit, ...]
    calibration: Calibration | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the matching is left out."""
        return {
            "errors": self.errors.to_dict(),
            "ap_at": dict(zip(map(str, THRESHOLDS), self.ap_at.tolist(), strict=True)),
            "fits": [fit.to_dict() for fit in self.fits],
            "calibration": self.calibration and self.calibration.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class Facts:
    """What a report states.

    Args:
        comparison: AP before and after, with intervals.
        verdict: the comparison in words.
        before, after: what is measured of each side.
        objects: number of objects that are to be found.
        image_ids: (images,) the ids that ``ap_of_image`` goes by.
    """

    comparison: Comparison
    verdict: Verdict
    before: Side
    after: Side
    objects: int
    image_ids: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, fractions in [0, 1]; None for what cannot be had."""
        images = zip(self.image_ids, self.before.ap_of_image.tolist(), self.after.ap_of_image.tolist(), strict=True)
        values: Mapping[str, Any] = {
            "verdict": vars(self.verdict),
            "comparison": self.comparison.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "objects": self.objects,
            "images": [{"id": number, "before": before, "after": after} for number, before, after in images],
        }
        return dict(finite(values))


def measure(
    before: Results,
    after: Results,
    ground_truth: GroundTruth,
    *,
    resamples: int = 1000,
    seed: int = 0,
    max_dets: int = 100,
    progress: Progress = no_progress,
) -> Facts:
    """Measure two sets of detections of the same images.

    Args:
        before, after, ground_truth, resamples, seed, max_dets: as :func:`iou_refiner.evaluation.bootstrap.compare`,
            whose numbers these are.
        progress: see :class:`Progress`.

    Raises:
        DataError, ValueError: as :func:`iou_refiner.evaluation.bootstrap.compare`.
    """
    check_positive("max_dets", max_dets)
    check_number("resamples", resamples, 0, MOST_RESAMPLES, whole=True)
    check(ground_truth, before=before, after=after)
    sides, resampled = [], []
    for number, (name, results) in enumerate((("before", before), ("after", after))):
        progress("measuring", number, 2)
        evaluator = match(results, ground_truth, max_dets)
        resampled.append(Resampled.of(evaluator, len(results), resamples, seed))
        sides.append(_side(name, evaluator, results, ground_truth))
    progress("measuring", 2, 2)
    comparison = difference(resampled[0], resampled[1])
    ids = tuple(int(number) for number in evaluator.params.imgIds)
    objects = int(sides[0].matching.judged.sum())
    return Facts(comparison, verdict_of(comparison), sides[0], sides[1], objects, ids)


def _side(name: str, evaluator: COCOeval, results: Results, ground_truth: GroundTruth) -> Side:
    matching = Matching.of(evaluator)
    true = true_iou(results, ground_truth)
    numbers = [(f"score {name}", results.score)]
    if results.iou is not None:
        numbers.append((f"predicted IoU {name}", results.iou))
    hit = np.zeros(len(results), bool)
    hit[matching.row[matching.hit[0]]] = True
    fits = (fit(label, values, true, hit) for label, values in numbers)
    counted = ~matching.ignored[0]
    return Side(
        matching,
        find_errors(matching, results, ground_truth),
        _ap_by_threshold(evaluator),
        image_ap(matching, len(evaluator.params.imgIds)),
        tuple(entry for entry in fits if entry is not None),
        calibrate(matching.score[counted], matching.hit[0][counted]),
    )


def _ap_by_threshold(evaluator: COCOeval) -> FloatArray:
    """(10,) mean over the categories that have objects; NaN where none has."""
    precision = evaluator.eval["precision"][:, :, :, 0, 0].mean(1)  # (T, K); -1 for absent categories
    present = (precision >= 0).all(0)
    if not present.any():
        return np.full(len(precision), np.nan)
    values: FloatArray = precision[:, present].mean(1)
    return values
