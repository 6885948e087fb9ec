"""Which detection hit which object: the matching of pycocotools as flat arrays, and average precision from such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.cocoeval import COCOeval

from iou_refiner.coco.data import FloatArray, IntArray

_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, eq=False)
class Matching:
    """The detections that count in AP, D of them, and the G annotated boxes, over all sizes.

    Args:
        row: (D,) rows of the results, by category, then image, then falling score.
        image: (D,) index of the image among the evaluator's.
        category: (D,) index of the category among the evaluator's.
        score: (D,).
        gt: (T, D) row of the annotation that each detection is matched with at IoU threshold ``t``, or -1.
        ignored: (T, D) bool, neither hit nor false alarm at threshold ``t``.
        gt_image, gt_category: (G,) indices of image and category of each annotated box.
        judged: (G,) bool, objects that are to be found; False for ignored regions.
    """

    row: IntArray
    image: IntArray
    category: IntArray
    score: FloatArray
    gt: IntArray
    ignored: NDArray[np.bool_]
    gt_image: IntArray
    gt_category: IntArray
    judged: NDArray[np.bool_]

    @property
    def hit(self) -> NDArray[np.bool_]:
        """(T, D), matched with an object that is to be found."""
        return (self.gt >= 0) & ~self.ignored

    @classmethod
    def of(cls, evaluator: COCOeval) -> Matching:
        """Of an evaluator from :func:`iou_refiner.evaluation.ap.match`, which numbers rows from 1."""
        params, entries = evaluator.params, evaluator.evalImgs
        areas, images = len(params.areaRng), len(params.imgIds)
        present: list[tuple[int, int, dict[str, Any]]] = []
        for category in range(len(params.catIds)):
            start = category * areas * images  # the first area range: all sizes
            present += [(category, i, e) for i, e in enumerate(entries[start : start + images]) if e is not None]
        counts = [len(entry["dtIds"]) for _, _, entry in present]

        def joined(key: str) -> NDArray[Any]:
            empty = np.zeros((len(params.iouThrs), 0))
            return np.concatenate([empty, *(entry[key] for _, _, entry in present)], axis=1)

        gt_image, gt_category, judged = _annotated(evaluator, present)
        return cls(
            row=np.array([number - 1 for _, _, entry in present for number in entry["dtIds"]], np.int64),
            image=np.repeat(np.array([image for _, image, _ in present], np.int64), counts),
            category=np.repeat(np.array([category for category, _, _ in present], np.int64), counts),
            score=np.array([score for _, _, entry in present for score in entry["dtScores"]], float),
            gt=joined("dtMatches").astype(np.int64) - 1,
            ignored=joined("dtIgnore").astype(bool),
            gt_image=gt_image,
            gt_category=gt_category,
            judged=judged,
        )


def _annotated(
    evaluator: COCOeval, present: list[tuple[int, int, dict[str, Any]]]
) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """Image, category and whether it is to be found, of each annotated box in file order."""
    count = len(evaluator.cocoGt.anns)
    gt_image, gt_category, judged = np.full(count, -1), np.full(count, -1), np.zeros(count, bool)
    for category, image, entry in present:
        rows = np.array(entry["gtIds"], np.int64) - 1
        gt_image[rows], gt_category[rows] = image, category
        judged[rows] = np.asarray(entry["gtIgnore"]) == 0
    return gt_image, gt_category, judged


def average_precision(score: FloatArray, hit: NDArray[np.bool_], num_gt: int) -> FloatArray:
    """AP over the 101 recall levels of COCO.

    Args:
        score: (D,); equal scores keep their order.
        hit: (T, D), at each threshold.
        num_gt: number of objects.

    Returns:
        (T,) in [0, 1]; NaN where there is no object.
    """
    if num_gt == 0:
        return np.full(len(hit), np.nan)
    if not len(score):
        return np.zeros(len(hit))
    hits = hit[:, np.argsort(-score, kind="stable")].cumsum(1)
    precision = hits / np.arange(1, len(score) + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    values = np.zeros(len(hit))
    for t, (curve, recall) in enumerate(zip(envelope, hits / num_gt, strict=True)):
        at = np.searchsorted(recall, _RECALLS)
        values[t] = curve[at[at < len(curve)]].sum() / len(_RECALLS)
    return values


def mean_ap(score: FloatArray, category: IntArray, hit: NDArray[np.bool_], num_gt: IntArray) -> float:
    """Mean over the categories of their AP at one threshold.

    Args:
        score, category, hit: (D,).
        num_gt: (K,) number of objects of each category; a category without any does not count.

    Returns:
        In [0, 1]; NaN where there is no object at all.
    """
    values = []
    for index in np.flatnonzero(num_gt):
        chosen = category == index
        values.append(average_precision(score[chosen], hit[None, chosen], int(num_gt[index]))[0])
    return float(np.mean(values)) if values else float("nan")


def image_ap(matching: Matching, images: int) -> FloatArray:
    """AP over IoU .50:.05:.95 of each image alone (images,), all categories in one curve; NaN without objects."""
    num_gt = np.bincount(matching.gt_image[matching.judged], minlength=images)
    order = np.argsort(matching.image, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(matching.image, minlength=images))[:-1]) if images else []
    hit, counted = matching.hit, ~matching.ignored
    values = np.full(images, np.nan)
    for image in np.flatnonzero(num_gt):
        here = rows[image]
        # A detection that some thresholds ignore is left out at all of them: it is one in a thousand.
        here = here[counted[:, here].all(0)]
        values[image] = average_precision(matching.score[here], hit[:, here], int(num_gt[image])).mean()
    return values
