"""At which IoU thresholds a detection is a true positive: the matching of COCO's evaluation, for training.

Detections of one class go by falling score, and each takes the free object that it overlaps most, if by the threshold
at least; a second detection of the same object is a false positive. One that takes none, and that an ignored region
covers by the threshold, is not judged.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iou_refiner.numpy_boxes import pairwise_cover, pairwise_iou
from iou_refiner.siblings.sibling_net import THRESHOLDS
from iou_refiner.training.samples import Targets

# Those of pycocotools, to the last bit.
_THRESHOLDS = np.linspace(THRESHOLDS[0], THRESHOLDS[-1], len(THRESHOLDS))


def true_positives(boxes: Tensor, scores: Tensor, labels: Tensor, targets: Targets) -> Tensor:
    """Whether each of Q detections of one image is a true positive at each threshold.

    Args:
        boxes: (Q, 4) xyxy in the pixels of ``targets``.
        scores: (Q,), by which they are ordered; ties keep their order.
        labels: (Q,).
        targets: the annotation of the image.

    Returns:
        (Q, 10) float32: 1, 0, or NaN where the detection is not judged.
    """
    positive = np.zeros((len(boxes), len(THRESHOLDS)), np.float32)
    corners = boxes.detach().double().numpy()
    for label in labels.unique():
        of_label = torch.nonzero(labels == label).flatten()
        rows = of_label[scores[of_label].argsort(descending=True, stable=True)].numpy()
        gt_boxes = targets.gt_boxes[targets.gt_labels == label].double().numpy()
        ignored = targets.ignored_boxes[targets.ignored_labels == label].double().numpy()
        hits = _match(pairwise_iou(corners[rows], gt_boxes))
        if len(ignored):
            cover = pairwise_cover(corners[rows], ignored).max(1)
            hits[(cover[:, None] >= _THRESHOLDS) & (hits == 0)] = np.nan
        positive[rows] = hits
    return torch.from_numpy(positive)


def _match(overlap: NDArray[np.float64]) -> NDArray[np.float32]:
    """1 where a detection takes an object, (Q, 10), for the IoU (Q, G) of detections by falling score."""
    hits = np.zeros((len(overlap), len(_THRESHOLDS)), np.float32)
    if not overlap.shape[1]:
        return hits
    free = np.ones((len(_THRESHOLDS), overlap.shape[1]), bool)
    every = np.arange(len(_THRESHOLDS))
    for row in np.flatnonzero(overlap.max(1) >= _THRESHOLDS[0]):
        left = np.where(free, overlap[row], -1.0)
        best = left.shape[1] - 1 - left[:, ::-1].argmax(1)  # as in pycocotools, the last of those that fit equally
        taken = left[every, best] >= _THRESHOLDS
        free[every[taken], best[taken]] = False
        hits[row] = taken
    return hits
