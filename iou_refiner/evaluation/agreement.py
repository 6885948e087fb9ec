"""How well a prediction agrees with the true IoU, in order and in size. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from iou_refiner.coco.data import FloatArray
from iou_refiner.evaluation.ap import plain


@dataclass(frozen=True)
class Agreement:
    """How well predicted IoU follows true IoU.

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


def agreement(predicted: FloatArray, true: FloatArray, *, above: float = 0.5) -> Agreement:
    """Correlation and error of predicted IoU on the pairs whose true IoU exceeds ``above``.

    Args:
        predicted: (n,) predicted IoU.
        true: (n,) true IoU, see :mod:`iou_refiner.evaluation.true_iou`; NaN, not judged, is left out.
        above: a true IoU up to this is left out; a detector's many misses would otherwise drown the order among hits.

    Raises:
        ValueError: lengths differ, or an IoU lies outside [0, 1].
    """
    predicted, true = _pairs(predicted, true, above)
    error = float(np.abs(predicted - true).mean()) if len(true) else float("nan")
    return Agreement(_correlation(predicted, true), _correlation(_ranks(predicted), _ranks(true)), error, len(true))


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
    chosen = true > above
    return predicted[chosen], true[chosen]


def _ranks(values: FloatArray) -> FloatArray:
    """Rank of each value, equal values sharing the average of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson's correlation, NaN where it is undefined."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
