"""Soft-NMS (Bodla et al., ICCV 2017), in numpy: all classes take their turns at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from iou_refiner.checks import check_choice, check_positive
from iou_refiner.numpy_boxes import iou_of_corners
from iou_refiner.stage.nms import check_nms, falling_order

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    threshold: float = 0.5,
    min_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al., ICCV 2017): overlapping boxes lose score instead of being removed.

    Args:
        boxes, scores, labels: as in :func:`iou_guided_nms`.
        method: ``"gaussian"`` multiplies by ``exp(-IoU^2 / sigma)``, ``"linear"`` by ``1 - IoU`` above ``threshold``.
        sigma: width of the Gaussian.
        threshold: IoU above which the linear method acts.
        min_score: boxes whose score falls below it are dropped.

    Returns:
        ``keep`` (K,) int64 by falling new score, and the new scores (K,).
    """
    labels = check_nms(boxes, scores, labels, threshold)
    check_choice("method", method, ["gaussian", "linear"])
    check_positive("sigma", sigma)

    def decay(iou: FloatArray) -> FloatArray:
        return np.exp(-(iou**2) / sigma) if method == "gaussian" else np.where(iou > threshold, 1 - iou, 1.0)

    finite = torch.where(torch.isfinite(boxes).all(1, keepdim=True), boxes, 0)  # an empty box overlaps nothing
    columns = (finite.double().cpu().numpy(), scores.double().cpu().numpy(), labels.cpu().numpy())
    new = torch.from_numpy(_decayed(*columns, decay, min_score)).to(scores)
    order = falling_order(new, scores)
    keep = order[new[order] >= min_score]
    return keep, new[keep]


def _decayed(
    boxes: FloatArray, scores: FloatArray, labels: IntArray, decay: Callable[[FloatArray], FloatArray], minimum: float
) -> FloatArray:
    """New scores (N,). Classes of like size share a padded table, so that one step is a turn in each of them."""
    new = scores.copy()
    by_label = labels.argsort(kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = sizes.cumsum() - sizes
    tables = np.log2(sizes).astype(int) // 2  # sizes within a factor of 4: at most as much padding
    for table in np.unique(tables):
        start, size = starts[tables == table, None], sizes[tables == table, None]
        step = np.arange(size.max())
        rows, used = by_label[np.minimum(start + step, len(labels) - 1)], step < size
        turned = _take_turns(boxes[rows], np.where(used, scores[rows], -np.inf), decay, minimum)
        new[rows[used]] = turned[used]
    return new


def _take_turns(
    boxes: FloatArray, waiting: FloatArray, decay: Callable[[FloatArray], FloatArray], minimum: float
) -> FloatArray:
    """Scores (L, M) after every line of boxes (L, M, 4) has taken its turns, by falling current score.

    ``waiting`` holds the scores, -inf where there is no box; it is used up.
    """
    new, lines = waiting.copy(), np.arange(len(waiting))
    columns = np.moveaxis(boxes, 2, 0).copy()
    low, high = columns[:2], columns[2:]
    area = np.maximum(high - low, 0).prod(0)
    for _ in range(waiting.shape[1]):
        best = waiting.argmax(1)
        turn = waiting[lines, best] >= minimum  # a line below it is through
        if not turn.any():
            break
        at = lines[turn], best[turn]
        new[at] = waiting[at]
        waiting[at] = -np.inf
        one = lines, best, None
        iou = iou_of_corners(low, high, low[(slice(None), *one)], high[(slice(None), *one)], area, area[one])
        np.multiply(waiting, decay(iou), out=waiting, where=turn[:, None] & (waiting > -np.inf))
    return np.where(waiting > -np.inf, waiting, new)
