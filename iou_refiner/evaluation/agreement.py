"""How good the predicted IoU is: against the true one, in order and in size. Needs no torch, changes nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iou_refiner.checks import check_positive
from iou_refiner.coco import GroundTruth, Results, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray
from iou_refiner.evaluation.ap import check, or_none, plain


@dataclass(frozen=True)
class Ranking:
    """How well predicted IoU orders and matches true IoU.

    Args:
        pearson: linear correlation; NaN for fewer than two pairs or where either side is constant.
        spearman: correlation of the ranks, ties at their average rank; NaN likewise.
        mean_absolute_error: of the predicted IoU; NaN without pairs.
        count: number of pairs.
    """

    pearson: float
    spearman: float
    mean_absolute_error: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, None for NaN."""
        return plain(asdict(self))


@dataclass(frozen=True)
class CalibrationBin:
    """The pairs whose predicted IoU lies in [low, high): their mean predicted and true IoU (NaN if none), and count."""

    low: float
    high: float
    predicted: float
    true: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Mean true against mean predicted IoU, bin by bin.

    Args:
        bins: equally wide, over [0, 1]; the last includes 1.
        error: expected calibration error, the mean over pairs of their bin's ``|predicted - true|``; NaN without pairs.
    """

    bins: tuple[CalibrationBin, ...]
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, None for NaN."""
        return {"bins": [plain(asdict(part)) for part in self.bins], "error": or_none(self.error)}


def true_iou(results: Results, ground_truth: GroundTruth) -> FloatArray:
    """IoU of each record with the best object of its image and category.

    Unlike in the matching of AP, several records may have the same best object.

    Returns:
        (n,) in [0, 1]; 0 where there is no such object. NaN, "not judged", where a crowd region covers at least half of
        the box, and more of it than the IoU with the best object: pycocotools ignores such detections.

    Raises:
        DataError: as :func:`iou_refiner.evaluation.ap.evaluate`.
    """
    check(ground_truth, results=results)
    found, objects = xywh_to_xyxy(results.bbox), xywh_to_xyxy(ground_truth.bbox)
    crowd = ground_truth.iscrowd
    by_image = ground_truth.by_image()
    best = np.zeros(len(results))
    for image, rows in results.by_image().items():
        there = by_image[image]
        same = results.category_id[rows, None] == ground_truth.category_id[there]
        iou, covered = _iou_and_cover(found[rows], objects[there])
        fit = np.where(same & ~crowd[there], iou, 0).max(1, initial=0)
        cover = np.where(same & crowd[there], covered, 0).max(1, initial=0)
        best[rows] = np.where((cover >= 0.5) & (cover > fit), np.nan, fit)
    return best


def ranking(predicted: FloatArray, true: FloatArray, *, above: float = 0.5) -> Ranking:
    """Correlation and error of predicted IoU on the pairs whose true IoU exceeds ``above``.

    Args:
        predicted: (n,) predicted IoU.
        true: (n,) true IoU, as :func:`true_iou` gives it; NaN, not judged, is left out.
        above: a true IoU up to this is left out; a detector's many misses would otherwise drown the order among hits.

    Raises:
        ValueError: lengths differ, or an IoU lies outside [0, 1].
    """
    predicted, true = _pairs(predicted, true, above)
    error = float(np.abs(predicted - true).mean()) if len(true) else float("nan")
    return Ranking(_correlation(predicted, true), _correlation(_ranks(predicted), _ranks(true)), error, len(true))


def calibration(predicted: FloatArray, true: FloatArray, bins: int = 10) -> Calibration:
    """Compare mean predicted and mean true IoU in equally wide bins of predicted IoU.

    Args:
        predicted: (n,) predicted IoU.
        true: (n,) true IoU, as :func:`true_iou` gives it; NaN, not judged, is left out.
        bins: how many.

    Raises:
        ValueError: lengths differ, or an IoU lies outside [0, 1], or there is no bin.
    """
    check_positive("bins", bins)
    predicted, true = _pairs(predicted, true, -np.inf)
    edges = np.linspace(0, 1, bins + 1)
    place = np.minimum(np.searchsorted(edges, predicted, side="right") - 1, bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, values, minlength=bins) for values in (predicted, true)]
    means = [np.divide(total, count, out=np.full(bins, np.nan), where=count > 0) for total in sums]
    error = float(np.abs(sums[0] - sums[1]).sum() / len(true)) if len(true) else float("nan")
    columns = (edges[:-1], edges[1:], *means, count)
    parts = (CalibrationBin(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
    return Calibration(tuple(parts), error)


def _iou_and_cover(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """IoU of each row of ``a`` with each of ``b``, and the part of ``a`` that ``b`` covers: (N, M) from xyxy."""
    sides = [
        np.clip(np.minimum(a[:, None, end], b[:, end]) - np.maximum(a[:, None, start], b[:, start]), 0, None)
        for start, end in ((0, 2), (1, 3))
    ]
    common = sides[0] * sides[1]
    area_a, area_b = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (a, b))
    union = area_a[:, None] + area_b - common
    tiny = np.finfo(np.float64).tiny  # empty boxes overlap nothing
    return common / np.maximum(union, tiny), common / np.maximum(area_a, tiny)[:, None]


def _pairs(predicted: FloatArray, true: FloatArray, above: float) -> tuple[FloatArray, FloatArray]:
    """The judged pairs with a true IoU above a threshold; both arguments checked."""
    predicted, true = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise ValueError(f"`predicted` and `true` must both have shape (n,), got {predicted.shape} and {true.shape}.")
    for name, wrong, values in (
        ("predicted", ~((predicted >= 0) & (predicted <= 1)), predicted),
        ("true", (true < 0) | (true > 1), true),
    ):
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(f"`{name}` must lie in [0, 1], got {values[first]} at index {first}.")
    judged = true > above
    return predicted[judged], true[judged]


def _ranks(values: FloatArray) -> FloatArray:
    """Rank of each value, equal values sharing the average of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson's correlation, NaN where it is undefined."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
