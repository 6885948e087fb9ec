"""Isotonic regression of the true IoU on a score: the best that a calibration, which sees the score alone, can do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import isotonic_regression

from iou_refiner.coco.data import FloatArray


def rising_map(score: FloatArray, iou: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """The rising map from a score to the true IoU (NaN where it is not judged) that fits best."""
    judged = np.isfinite(iou)
    order = np.argsort(score[judged])
    score, iou = score[judged][order], iou[judged][order]
    fit = isotonic_regression(iou)
    # Steps would make ties, and lose the order within them; lines between their centres make none.
    steps = fit.blocks[:-1]
    centers = np.add.reduceat(score, steps) / np.diff(fit.blocks)
    x, y = np.r_[0.0, centers, 1.0], np.r_[0.0, fit.x[steps], 1.0]
    return lambda scores: np.interp(scores, x, y)
