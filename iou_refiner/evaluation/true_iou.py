"""The true IoU of boxes with the annotated objects: one rule, for training and for evaluation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from iou_refiner.coco import GroundTruth, Results, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray, IntArray
from iou_refiner.evaluation.ap import check
from iou_refiner.numpy_boxes import pairwise_cover, pairwise_iou

# Share of a box inside an ignored region from which on the region decides, as at the lowest threshold of AP.
_LEAST_COVER = 0.5


def match_boxes(
    boxes: npt.NDArray[np.floating],
    labels: IntArray,
    gt_boxes: npt.NDArray[np.floating],
    gt_labels: IntArray,
    ignored: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.floating], IntArray]:
    """The IoU of each box with the best object of its class, and which object that is.

    Several boxes may share one object, unlike in the matching of AP. Ignored regions (crowds) act as in pycocotools: on
    boxes of the same class, by the share of the box that they cover. A box is not judged (NaN) where such a region
    covers at least half of it, and more of it than the IoU with its best object.

    Args:
        boxes, labels: (R, 4) xyxy and (R,).
        gt_boxes, gt_labels: (G, 4) xyxy and (G,), all annotated boxes.
        ignored: (G,), those that are regions not to be judged.

    Returns:
        IoU (R,) in [0, 1] or NaN, 0 where no object of the class is there; the row (R,) of the best object in
        ``gt_boxes``, 0 where there is none.
    """
    if not len(gt_boxes):
        return np.zeros(len(boxes), boxes.dtype), np.zeros(len(boxes), np.int64)
    same = labels[:, None] == gt_labels
    iou = np.where(same & ~ignored, pairwise_iou(boxes, gt_boxes), 0)
    best = iou.max(1)
    if ignored.any():
        cover = np.where(same[:, ignored], pairwise_cover(boxes, gt_boxes[ignored]), 0).max(1)
        best = np.where((cover >= _LEAST_COVER) & (cover > best), np.nan, best)
    return best, iou.argmax(1)


def true_iou(results: Results, ground_truth: GroundTruth) -> FloatArray:
    """IoU (n,) of each record with the best object of its image and category, by :func:`match_boxes`.

    Raises:
        DataError: as :func:`iou_refiner.evaluation.ap.evaluate`.
    """
    check(ground_truth, results=results)
    boxes, gt_boxes = xywh_to_xyxy(results.bbox), xywh_to_xyxy(ground_truth.bbox)
    gt_rows = ground_truth.by_image()
    iou = np.zeros(len(results))
    for image, rows in results.by_image().items():
        gt = gt_rows[image]
        iou[rows], _ = match_boxes(
            boxes[rows], results.category_id[rows], gt_boxes[gt], ground_truth.category_id[gt], ground_truth.iscrowd[gt]
        )
    return iou
