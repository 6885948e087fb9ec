"""How well a number follows the truth: score or predicted IoU against true IoU, and the calibration of the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.coco.data import FloatArray
from iou_refiner.evaluation.agreement import Agreement, agreement

BINS = 10  # of a table or a line
CELLS = 20  # a side of the heat map
_SPREAD = (10, 90)  # percentiles


@dataclass(frozen=True)
class Bin:
    """Detections of which a number in [0, 1] falls between ``low`` and ``high``.

    Args:
        low, high: the bounds; the highest bin holds 1.
        count: how many there are.
        mean: their mean true IoU, or the share of hits among them; NaN for none.
        spread: the 10th and 90th percentile of their true IoU, or NaN.
        value: the mean of the number itself; NaN for none.
    """

    low: float
    high: float
    count: int
    mean: float
    spread: tuple[float, float]
    value: float


@dataclass(frozen=True, eq=False)
class Fit:
    """How a number in [0, 1] said of each box goes with its true IoU.

    Args:
        name: of the number, in words.
        agreement: over the boxes that hit an object at IoU 0.5, one for each object: a suppression that keeps
            duplicates, and lowers their scores as it should, does not change it.
        bins: true IoU of all boxes by bins of the number.
        cells: (20, 20) int64, boxes by true IoU (rows, from 0 up) and by the number (columns).
    """

    name: str
    agreement: Agreement
    bins: tuple[Bin, ...]
    cells: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        bins = [vars(entry) for entry in self.bins]
        return {"name": self.name, "agreement": self.agreement.to_dict(), "bins": bins, "cells": self.cells.tolist()}


def fit(name: str, value: FloatArray, true: FloatArray, hit: NDArray[np.bool_]) -> Fit | None:
    """How ``value`` (n,) goes with true IoU (n,), NaN of which are left out; None if a value lies outside [0, 1].

    ``hit`` (n,) says which boxes are matched with an object, each object once.
    """
    judged = ~np.isnan(true)
    value, true, hit = value[judged], true[judged], hit[judged]
    if not _in_unit(value):
        return None
    edges = np.linspace(0, 1, CELLS + 1)
    cells, _, _ = np.histogram2d(true, value, bins=(edges, edges))
    return Fit(name, agreement(value[hit], true[hit], above=0), _bins(value, true), cells.astype(np.int64))


@dataclass(frozen=True)
class Calibration:
    """How often detections of a score are right: matched with an object at IoU 0.5, each object once.

    Args:
        error: mean distance of score and share of hits over all detections, by bins (expected calibration error).
        bins: share of hits by bins of the score.
    """

    error: float
    bins: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"error": self.error, "bins": [{**vars(entry), "spread": None} for entry in self.bins]}


def calibrate(score: FloatArray, hit: NDArray[np.bool_]) -> Calibration | None:
    """Of scores (n,) and whether each detection is a hit (n,); None if a score lies outside [0, 1]."""
    if not _in_unit(score):
        return None
    bins = _bins(score, hit.astype(float))
    gaps = [entry.count * abs(entry.value - entry.mean) for entry in bins if entry.count]
    return Calibration(sum(gaps) / len(score) if len(score) else float("nan"), bins)


def _in_unit(values: FloatArray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())


def _bins(value: FloatArray, outcome: FloatArray) -> tuple[Bin, ...]:
    """The outcome by equal bins of the value."""
    index = np.minimum((value * BINS).astype(int), BINS - 1)
    nothing = float("nan")
    bins = []
    for number in range(BINS):
        here = outcome[index == number]
        bounds = number / BINS, (number + 1) / BINS
        if len(here):
            low, high = np.percentile(here, _SPREAD)
            own = float(value[index == number].mean())
            bins.append(Bin(*bounds, len(here), float(here.mean()), (float(low), float(high)), own))
        else:
            bins.append(Bin(*bounds, 0, nothing, (nothing, nothing), nothing))
    return tuple(bins)
