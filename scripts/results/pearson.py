"""How well a head's IoU follows the true one, with the interval that comes of the choice of images."""

from __future__ import annotations

import numpy as np
import torch

from iou_refiner.head.iou_head import IoUHead
from iou_refiner.training.samples import TrainingSet

_RESAMPLES = 1000


@torch.no_grad()
def pearson_of_images(head: IoUHead, dataset: TrainingSet, *, above: float = 0.5, seed: int = 0) -> dict[str, float]:
    """Pearson correlation of predicted and true IoU, over candidates whose true IoU is ``above``.

    Returns:
        ``value``, its 95 % interval ``low`` and ``high`` over resamples of the images, and ``score``: the correlation
        of the class score.
    """
    sums = []
    for index in range(len(dataset)):
        extraction, targets = dataset.load(index)
        candidates, table = extraction.candidates, head.encode(extraction.features)
        labels = candidates.labels
        predicted = head.predict(table, candidates.boxes, torch.zeros_like(labels), labels).iou.nan_to_num(0.0)
        truth = targets.true_iou(candidates.boxes, labels)
        rows = truth > above  # False where it is not judged
        x, s, y = (column[rows].double().numpy() for column in (predicted, candidates.scores, truth))
        sums.append([_moments(x, y), _moments(s, y)])
    moments = np.array(sums)
    draws = np.random.default_rng(seed).integers(0, len(moments), (_RESAMPLES, len(moments)))
    resampled = [_pearson(moments[draw, 0].sum(0)) for draw in draws]
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    value, score = (_pearson(part) for part in moments.sum(0))
    return {"value": value, "low": float(low), "high": float(high), "score": score}


def _moments(x: np.ndarray, y: np.ndarray) -> list[float]:
    return [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]


def _pearson(moments: np.ndarray) -> float:
    n, x, y, xx, yy, xy = moments
    return float((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)))
