"""Traces that earlier treatment left in a results file: scores cut off, boxes already suppressed."""

from __future__ import annotations

import numpy as np

from iou_refiner.coco import Results, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray, IntArray
from iou_refiner.numpy_boxes import paired_iou
from iou_refiner.validation.findings import ENOUGH, Finding, Subject, about_file

_PAIRS = 4_000_000  # looked at for traces of NMS
_PER_GROUP = 200  # best boxes of one class in one image, compared with one another for traces of NMS


def check_cut(subject: Subject) -> list[Finding]:
    """W221: low scores were cut off."""
    scores = subject.results.score
    if len(scores) < ENOUGH or scores.min() < 0.05:
        return []
    message = (
        f"no score is below {scores.min():.2f}: the file was cut there, and low scores are what rescoring lifts. "
        "Save detections from a score of .001 or less."
    )
    return [about_file("W221", message)]


def check_nms(subject: Subject) -> list[Finding]:
    """W220: the file was NMS-ed before."""
    threshold = suppressed_at(subject.results)
    if threshold is None:
        return []
    message = (
        f"the file looks already NMS-ed at about {threshold:.2f}, the largest same-class overlap found. IoU-guided NMS "
        "has nothing to do; rescoring and refinement still act. Save the boxes before NMS to use all three."
    )
    return [about_file("W220", message)]


@np.errstate(over="ignore", invalid="ignore")  # absurd numbers are told elsewhere
def suppressed_at(results: Results) -> float | None:
    """The IoU threshold at which detections look NMS-ed, or None if they do not.

    Args:
        results: n detections, of any number of images and categories.

    Returns:
        The largest IoU of two boxes of one class in one image, where many pairs come close to it and none is beyond.
    """
    overlaps = _same_class_overlaps(results)
    if not len(overlaps):
        return None
    largest = float(overlaps.max())
    # NMS cuts a distribution off, so pairs crowd below the threshold; a crowd-free scene has a tail that thins out.
    near = int((overlaps > largest - 0.1).sum())
    return None if largest > 0.95 or largest < 0.2 or near < ENOUGH else largest


def _same_class_overlaps(results: Results) -> FloatArray:
    """Non-zero IoUs of pairs of one class in one image, from a sample of bounded size.

    A pair above the threshold is in almost every group of a file that was not NMS-ed and in none of one that was, so
    a sample of groups tells; and NMS leaves no pair among the best boxes if it leaves none at all.
    """
    rows, group = _sample_groups(results)
    boxes = xywh_to_xyxy(results.bbox[rows])
    overlaps = [np.empty(0)]
    left = np.arange(len(rows))
    for step in range(1, _PER_GROUP):
        left = left[left + step < len(rows)]
        left = left[group[left] == group[left + step]]
        if not len(left):
            break
        iou = paired_iou(boxes[left], boxes[left + step])
        overlaps.append(iou[iou > 0])
    return np.concatenate(overlaps)


def _sample_groups(results: Results) -> tuple[IntArray, IntArray]:
    """Rows of evenly spread (image, class) groups, best first, within the budget of pairs; and each row's group."""
    order = np.lexsort((-results.score, results.category_id, results.image_id))
    image, category = results.image_id[order], results.category_id[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (image[1:] != image[:-1]) | (category[1:] != category[:-1])
    del image, category  # each as large as the file's columns
    group = np.cumsum(begins, dtype=np.int32) - 1
    best = np.arange(len(order), dtype=np.int32) - np.flatnonzero(begins).astype(np.int32)[group] < _PER_GROUP
    order, group = order[best], group[best]
    sizes = np.bincount(group)
    pairs = int((sizes * (sizes - 1) // 2).sum())
    stride = -(-pairs // _PAIRS) or 1
    chosen = group % stride == 0
    return order[chosen], group[chosen]
