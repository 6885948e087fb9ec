"""Every metric of AP under random draws of the images.

Only the accumulation of AP mixes images; the matching of detections to objects does not. So one matching, that of
pycocotools, serves all resamples: a resample is a vector of image multiplicities, and its precision curve is a weighted
running sum over detections that were sorted once. Precision rises at hits and falls between them, so a curve and its
envelope are needed at the hits alone, of which there are at most as many as objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from iou_refiner.coco.data import FloatArray, IntArray
from iou_refiner.evaluation.ap import METRICS, metrics

_THRESHOLDS = 10
_RECALLS = np.linspace(0, 1, 101)
# Weights gathered at once (resamples x detections): 16 MB, enough to be fast and little enough to stay near the cache.
_CHUNK = 2_000_000


def resampled_metrics(
    curves: Sequence[Sequence[Curve]], images: int, resamples: int, seed: int
) -> dict[str, FloatArray]:
    """Every metric (resamples,) under random draws of the images: :func:`weighted_metrics` of :func:`resample`, with
    no more than some of the draws in memory."""
    values = sum(len(row) * _THRESHOLDS for row in curves)  # that one draw comes to
    at_once = max(1, _CHUNK // max(images, values, 1))
    parts = [weighted_metrics(curves, part) for part in _resample_in_parts(images, resamples, seed, at_once)]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


@dataclass(frozen=True, eq=False)
class Curve:
    """What the precision curve of one category and area range is made of, D detections by falling score.

    Args:
        image: (D,) which image, by index, each detection lies in.
        hit: (T, D) bool, detection is matched with an object at IoU threshold ``t``.
        counted: (T, D) bool, detection is a hit or a false alarm at threshold ``t``, not ignored.
        num_gt: (I,) number of objects in each image.
    """

    image: IntArray
    hit: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    num_gt: IntArray

    @classmethod
    def from_matches(cls, matches: Sequence[dict[str, Any] | None], thresholds: int) -> Curve:
        """The curve of one entry per image of ``COCOeval.evalImgs``; an image without anything has None."""
        present = [(index, entry) for index, entry in enumerate(matches) if entry is not None]
        num_gt = np.zeros(len(matches), np.int64)
        for index, entry in present:
            num_gt[index] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        if not present:
            nothing = np.zeros((thresholds, 0), bool)
            return cls(np.zeros(0, np.int64), nothing, nothing, num_gt)
        image = np.repeat([index for index, _ in present], [len(entry["dtScores"]) for _, entry in present])
        scores = np.concatenate([entry["dtScores"] for _, entry in present])
        order = np.argsort(-scores, kind="stable")  # ties stay in image order, as in pycocotools
        matched = np.concatenate([entry["dtMatches"] for _, entry in present], axis=1)[:, order] != 0
        counted = np.concatenate([entry["dtIgnore"] for _, entry in present], axis=1)[:, order] == 0
        return cls(image[order], matched & counted, counted, num_gt)


def curves(evaluator: COCOeval) -> list[list[Curve]]:
    """One row per category, one curve per area range."""
    params = evaluator.params
    images, areas, thresholds = len(params.imgIds), len(params.areaRng), len(params.iouThrs)

    def curve(category: int, area: int) -> Curve:
        start = (category * areas + area) * images
        return Curve.from_matches(evaluator.evalImgs[start : start + images], thresholds)

    return [[curve(category, area) for area in range(areas)] for category in range(len(params.catIds))]


def _running(weights: IntArray, image: IntArray, members: IntArray, at: IntArray) -> IntArray:
    """Weight (B, len(at)) of the detections ``members`` up to and including each position of ``at``; both sorted."""
    total = np.zeros((len(weights), len(members) + 1), np.int64)
    np.cumsum(weights[:, image[members]], axis=1, out=total[:, 1:])
    return total[:, np.searchsorted(members, at, side="right")]


def _weighted_curve(curve: Curve, weights: IntArray) -> tuple[FloatArray, FloatArray]:
    """AP and final recall, each (B, T), of one curve under (B, I) image multiplicities; NaN where no object is left."""
    num_gt = weights @ curve.num_gt
    precision = np.zeros((len(weights), len(curve.hit)))
    recall = np.zeros_like(precision)
    # Hardly any detection is ignored at some thresholds only: what all thresholds count is summed once for all.
    always = curve.counted.all(0)
    positions = np.flatnonzero(curve.hit.any(0))
    shared = _running(weights, curve.image, np.flatnonzero(always), positions)
    for t, (hit, counted) in enumerate(zip(curve.hit, curve.counted, strict=True)):
        at = np.flatnonzero(hit)
        if not len(at):
            continue
        hits = _running(weights, curve.image, at, at)
        alone = _running(weights, curve.image, np.flatnonzero(counted & ~always), at)
        seen = shared[:, np.searchsorted(positions, at)] + alone
        envelope = np.maximum.accumulate((hits / np.maximum(seen, 1))[:, ::-1], axis=1)[:, ::-1]
        reached = hits / np.maximum(num_gt, 1)[:, None]
        levels = np.searchsorted(_RECALLS, reached, side="right")  # recall levels passed so far
        precision[:, t] = (envelope * np.diff(levels, axis=1, prepend=0)).sum(1) / len(_RECALLS)
        recall[:, t] = reached[:, -1]
    precision[num_gt == 0] = recall[num_gt == 0] = np.nan
    return precision, recall


def weighted_metrics(curves: Sequence[Sequence[Curve]], weights: IntArray) -> dict[str, FloatArray]:
    """Every metric under image multiplicities.

    Args:
        curves: one row per category, one curve per area range.
        weights: (B, I) int64, how often each image counts, one row per resample.

    Returns:
        (B,) per name of :data:`iou_refiner.evaluation.ap.METRICS`. With all multiplicities 1 these are the numbers of
        pycocotools; in general those of a data set with repeated images, but for the order of equal scores within one.
    """
    areas, thresholds = len(curves[0]) if curves else 4, _THRESHOLDS
    precision = np.full((len(weights), len(curves), areas, thresholds), np.nan)
    recall = np.full((len(weights), len(curves), thresholds), np.nan)
    for k, row in enumerate(curves):
        for a, curve in enumerate(row):
            rows = max(1, _CHUNK // max(1, len(curve.image)))
            for start in range(0, len(weights), rows):
                part = slice(start, start + rows)
                precision[part, k, a], final = _weighted_curve(curve, weights[part])
                if a == 0:
                    recall[part, k] = final
    return metrics(precision, recall)


def resample(images: int, resamples: int, seed: int) -> IntArray:
    """Image multiplicities (resamples, images) of drawing ``images`` images with replacement, again and again."""
    return next(_resample_in_parts(images, resamples, seed, max(resamples, 1)))


def _resample_in_parts(images: int, resamples: int, seed: int, at_once: int) -> Iterator[IntArray]:
    """The same, at most ``at_once`` rows at a time, and at least one array."""
    generator = np.random.default_rng(seed)
    for start in range(0, max(resamples, 1), at_once):
        weights = np.zeros((min(at_once, resamples - start), images), np.int64)
        for row in weights:
            row += np.bincount(generator.integers(max(images, 1), size=images), minlength=images)
        yield weights


def interval(differences: FloatArray, coverage: float = 0.95) -> tuple[float, float]:
    """The central percentile interval of (B,) resampled differences; NaN ones do not count, none gives (NaN, NaN)."""
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return float("nan"), float("nan")
    low, high = np.quantile(differences, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
