"""How boxes are written: as corners, as centres, normalised, in pixels of another size; judged from many of them."""

from __future__ import annotations

import numpy as np

from iou_refiner.coco import GroundTruth, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray, IntArray
from iou_refiner.numpy_boxes import pairwise_iou
from iou_refiner.validation.findings import ENOUGH, Finding, Subject

EDGE = 1.0  # pixels that rounding may put a box beyond its image
_IMAGES = 500  # looked at when boxes are held against objects


def sizes_of_images(truth: GroundTruth | None, image_id: IntArray) -> FloatArray:
    """(n, 2) width and height of the image of each id; NaN where the image is unknown."""
    sizes = np.full((len(image_id), 2), np.nan)
    if truth is not None and truth.images:
        ids = np.array([image.id for image in truth.images], np.int64)
        table = np.array([(image.width, image.height) for image in truth.images], np.float64)
        order = np.argsort(ids)
        place = order[np.searchsorted(ids, image_id, sorter=order).clip(max=len(ids) - 1)]
        known = ids[place] == image_id
        sizes[known] = table[place[known]]
    return sizes


def look_normalised(boxes: FloatArray) -> bool:
    """Whether no coordinate of (n, 4) boxes, n not small, is above 1.5, which in pixels would be one dot."""
    return bool(boxes.max() <= 1.5)


@np.errstate(over="ignore", invalid="ignore")  # absurd numbers are told elsewhere
def look_xyxy(boxes: FloatArray, sizes: FloatArray) -> bool:
    """Whether boxes (n, 4), n not small, make sense as corners and not as corner and size.

    As corners, the second pair always exceeds the first. So it does for boxes that start near the origin, read as
    sizes; but those cannot also begin in the far half of what the file's boxes reach.

    Args:
        boxes: as they are written.
        sizes: (n, 2) of their images, NaN where unknown.
    """
    ordered = (boxes[:, 2:] > boxes[:, :2]).all(1).mean() >= 0.99
    far = (boxes[:, :2] > boxes[:, 2:].max(0) / 2).any(1).mean() >= 0.05
    known = ~np.isnan(sizes).any(1)
    if not (ordered and far) or not known.any():
        return bool(ordered and far)
    inside = (boxes[known, 2:] <= sizes[known] + EDGE).all(1).mean() >= 0.99
    beyond = (boxes[known, :2] + boxes[known, 2:] > sizes[known] + EDGE).any(1).mean() >= 0.1
    return bool(inside and beyond)


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def check_fit(subject: Subject) -> list[Finding]:
    """E504, E505: boxes that miss the objects as they are written, and meet them when read in another way."""
    rows, objects = _best_records(subject)
    if len(rows) < ENOUGH or subject.truth is None:
        return []
    boxes = subject.results.bbox[rows]
    gt_boxes = [subject.truth.bbox[group] for group in objects]
    before = _median_iou(boxes, gt_boxes)
    if _explains(before, _median_iou(boxes - np.pad(boxes[:, 2:] / 2, ((0, 0), (0, 2))), gt_boxes)):
        message = (
            "boxes look like [centre x, centre y, width, height]: read so, they meet the objects. Subtract half of the "
            "size from the centre."
        )
        return subject.finding("E505", np.arange(len(subject.results)), message)
    factor = _common_factor(boxes, gt_boxes)
    if factor is not None and _explains(before, _median_iou(boxes / factor, gt_boxes)):
        message = (
            f"boxes look scaled by about {factor:.3g}: divided by that, they meet the objects. Scale them back to the "
            "original image."
        )
        return subject.finding("E504", np.arange(len(subject.results)), message)
    return []


def _best_records(subject: Subject) -> tuple[IntArray, list[IntArray]]:
    """The best record of each category in some of the images, where it has objects, and the rows of these objects."""
    truth, results = subject.truth, subject.results
    if truth is None or not len(truth):
        return np.empty(0, np.int64), []
    rows = np.flatnonzero(~truth.iscrowd & (truth.bbox[:, 2:] > 0).all(1))
    images = np.unique(truth.image_id[rows])
    images = images[:: -(-len(images) // _IMAGES) or 1]
    objects: dict[tuple[int, int], list[int]] = {}
    for row in rows[np.isin(truth.image_id[rows], images)].tolist():
        objects.setdefault((int(truth.image_id[row]), int(truth.category_id[row])), []).append(row)
    chosen = np.flatnonzero(np.isin(results.image_id, images) & (results.bbox[:, 2:] > 0).all(1))
    order = chosen[np.lexsort((-results.score[chosen], results.category_id[chosen], results.image_id[chosen]))]
    image, category = results.image_id[order], results.category_id[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (image[1:] != image[:-1]) | (category[1:] != category[:-1])
    best = [
        (row, objects[group])
        for row, *group_ in zip(order[begins].tolist(), image[begins].tolist(), category[begins].tolist(), strict=True)
        if (group := (group_[0], group_[1])) in objects
    ]
    return np.array([row for row, _ in best], np.int64), [np.array(group, np.int64) for _, group in best]


def _median_iou(boxes: FloatArray, gt_boxes: list[FloatArray]) -> float:
    corners = xywh_to_xyxy(boxes)
    best = [pairwise_iou(corners[i : i + 1], xywh_to_xyxy(gt)).max() for i, gt in enumerate(gt_boxes)]
    return float(np.median(best))


def _explains(before: float, after: float) -> bool:
    return after >= 0.5 and after - before >= 0.25


def _common_factor(boxes: FloatArray, gt_boxes: list[FloatArray]) -> float | None:
    """The factor between boxes and objects, where it is one for position and size; from objects that are alone."""
    alone = [i for i, gt in enumerate(gt_boxes) if len(gt) == 1]
    if len(alone) < ENOUGH:
        return None
    own, gt = boxes[alone], np.concatenate([gt_boxes[i] for i in alone])
    reach = np.concatenate([own[:, :2] + own[:, 2:] / 2, own[:, 2:]], 1)
    factors = np.median(reach / np.concatenate([gt[:, :2] + gt[:, 2:] / 2, gt[:, 2:]], 1), 0)
    usable = bool(np.isfinite(factors).all() and factors.min() > 0 and factors.max() < 1.15 * factors.min())
    return float(np.median(factors)) if usable else None
