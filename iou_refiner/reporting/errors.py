"""What kinds of error cost AP: the decomposition of TIDE (Bolya et al., ECCV 2020), from the paper's definitions.

Everything is judged at IoU 0.5 (foreground); below 0.1 is background. Each false alarm is of one kind, the first
that fits in the order below. "Own" is an object of the detection's class, "other" one of another class:

- **localisation**: IoU with an own object from 0.1 to below 0.5.
- **classification**: IoU with an other object of at least 0.5.
- **duplicate**: IoU with an own object of at least 0.5, which a detection of a higher score has already.
- **background**: IoU of at most 0.1 with every object.
- **both**: the rest, IoU with an other object from 0.1 to below 0.5.

**Missed** are objects that are not hit, and that no localisation or classification error aims at. How much a kind costs
is the AP50 that would be gained if it alone were mended, as the paper mends it: boxes moved onto their object, classes
corrected (of several detections of one object only the best scored remains), the other false alarms removed, missed
objects not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.coco import GroundTruth, Results, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray, IntArray, group_rows
from iou_refiner.numpy_boxes import pairwise_iou
from iou_refiner.reporting.matching import Matching, mean_ap

FOREGROUND, BACKGROUND = 0.5, 0.1
#: The kinds of false alarms in the order they are tried, then the missed objects.
KINDS = ("localisation", "classification", "duplicate", "background", "both", "missed")
_LOCALISATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND, _BOTH, _MISSED = range(6)


@dataclass(frozen=True)
class ErrorKind:
    """How often one kind of error occurs, and what it costs.

    Args:
        name: one of :data:`KINDS`.
        count: false alarms of this kind, or missed objects.
        cost: AP50, a fraction, that would be gained if this kind alone were mended; NaN where there is no object.
    """

    name: str
    count: int
    cost: float


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of one set of detections.

    Args:
        kinds: one entry per name of :data:`KINDS`.
        kind: (D,) index into :data:`KINDS` of each detection of the matching; -1 for hits and ignored ones.
        missed: (G,) bool, objects that nothing aims at.
    """

    kinds: tuple[ErrorKind, ...]
    kind: IntArray
    missed: NDArray[np.bool_]

    def to_dict(self) -> dict[str, Any]:
        """Count and cost by name."""
        return {kind.name: {"count": kind.count, "cost": kind.cost} for kind in self.kinds}


def find_errors(matching: Matching, results: Results, ground_truth: GroundTruth) -> Errors:
    """Sort the errors of matched detections by kind, and measure what each kind costs.

    Args:
        matching: of ``results`` with ``ground_truth``; its first threshold is IoU 0.5.
        results: the detections.
        ground_truth: the annotation.
    """
    kind, aim = _kinds(matching, xywh_to_xyxy(results.bbox), xywh_to_xyxy(ground_truth.bbox))
    hit = matching.hit[0]
    aimed_at = np.zeros(len(matching.judged), bool)
    aimed_at[matching.gt[0][hit]] = True
    aimed_at[aim[np.isin(kind, (_LOCALISATION, _CLASSIFICATION))]] = True
    missed = matching.judged & ~aimed_at
    counts = [int((kind == number).sum()) for number in range(_MISSED)] + [int(missed.sum())]
    costs = _costs(matching, kind, aim, missed)
    return Errors(tuple(ErrorKind(*entry) for entry in zip(KINDS, counts, costs, strict=True)), kind, missed)


def _kinds(matching: Matching, boxes: FloatArray, objects: FloatArray) -> tuple[IntArray, IntArray]:
    """The kind of each detection, -1 for hits and ignored ones, and the object it aims at, -1 for none."""
    kind, aim = np.full(len(matching.row), -1), np.full(len(matching.row), -1)
    false_alarm = np.flatnonzero(~matching.hit[0] & ~matching.ignored[0])
    judged = np.flatnonzero(matching.judged)
    of_image = group_rows(matching.gt_image[judged])
    for image, rows in group_rows(matching.image[false_alarm]).items():
        here, there = false_alarm[rows], judged[of_image.get(image, np.empty(0, np.int64))]
        if not len(there):
            kind[here] = _BACKGROUND
            continue
        iou = pairwise_iou(boxes[matching.row[here]], objects[there])
        same = matching.category[here][:, None] == matching.gt_category[there]
        own, other = np.where(same, iou, 0), np.where(same, 0, iou)
        conditions = (
            (own.max(1) >= BACKGROUND) & (own.max(1) < FOREGROUND),
            other.max(1) >= FOREGROUND,
            own.max(1) >= FOREGROUND,
            iou.max(1) <= BACKGROUND,
        )
        kind[here] = np.select(conditions, range(len(conditions)), _BOTH)
        aim[here] = there[np.where(kind[here] == _CLASSIFICATION, other.argmax(1), own.argmax(1))]
    return kind, aim


def _costs(matching: Matching, kind: IntArray, aim: IntArray, missed: NDArray[np.bool_]) -> list[float]:
    """What mending each kind alone would gain in AP50."""
    categories = int(matching.gt_category.max(initial=-1)) + 1
    num_gt = np.bincount(matching.gt_category[matching.judged], minlength=categories)
    counted, hit = ~matching.ignored[0], matching.hit[0]

    def ap(keep: NDArray[np.bool_], category: IntArray, hit: NDArray[np.bool_]) -> float:
        return mean_ap(matching.score[keep], category[keep], hit[keep], num_gt)

    now = ap(counted, matching.category, hit)
    costs = []
    for number in range(_MISSED):
        mended = kind == number
        if number in (_LOCALISATION, _CLASSIFICATION):
            costs.append(ap(*_aimed_right(matching, mended, aim)) - now)
        else:
            costs.append(ap(counted & ~mended, matching.category, hit) - now)
    return [*costs, _without_missed(matching, missed, num_gt) - now]


def _aimed_right(
    matching: Matching, mended: NDArray[np.bool_], aim: IntArray
) -> tuple[NDArray[np.bool_], IntArray, NDArray[np.bool_]]:
    """Which detections remain, their categories and hits, once the mended ones hit what they aim at."""
    hit = matching.hit[0]
    target = np.where(mended, aim, np.where(hit, matching.gt[0], -1))
    claims = np.flatnonzero(target >= 0)
    claims = claims[np.argsort(-matching.score[claims], kind="stable")]
    _, first = np.unique(target[claims], return_index=True)
    keep = ~matching.ignored[0]
    keep[claims] = False
    keep[claims[first]] = True
    category = matching.category.copy()
    category[mended] = matching.gt_category[aim[mended]]
    return keep, category, hit | mended


def _without_missed(matching: Matching, missed: NDArray[np.bool_], num_gt: IntArray) -> float:
    """AP50 where missed objects do not count. A category of which nothing is left keeps its AP, which is 0."""
    counted = ~matching.ignored[0]
    left = num_gt - np.bincount(matching.gt_category[missed], minlength=len(num_gt))
    part = mean_ap(matching.score[counted], matching.category[counted], matching.hit[0][counted], left)
    lost = int(((num_gt > 0) & (left == 0)).sum())
    present = int((num_gt > 0).sum())
    return 0.0 if lost and lost == present else part * (present - lost) / present if present else float("nan")
