"""The turns of Soft-NMS, in numpy: all classes take theirs at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def decayed(
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
    x1, y1, x2, y2 = np.moveaxis(boxes, 2, 0).copy()
    area = (x2 - x1).clip(min=0) * (y2 - y1).clip(min=0)
    for _ in range(waiting.shape[1]):
        best = waiting.argmax(1)
        turn = waiting[lines, best] >= minimum  # a line below it is through
        if not turn.any():
            break
        at = lines[turn], best[turn]
        new[at] = waiting[at]
        waiting[at] = -np.inf
        one = lines, best, None
        width = np.minimum(x2, x2[one]) - np.maximum(x1, x1[one])
        height = np.minimum(y2, y2[one]) - np.maximum(y1, y1[one])
        shared = width.clip(min=0) * height.clip(min=0)
        iou = shared / np.maximum(area + area[one] - shared, np.finfo(area.dtype).tiny)
        np.multiply(waiting, decay(iou), out=waiting, where=turn[:, None] & (waiting > -np.inf))
    return np.where(waiting > -np.inf, waiting, new)
