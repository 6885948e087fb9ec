"""What is wrong with an annotation: its images, its objects, and what pycocotools would make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iou_refiner.coco import GroundTruth
from iou_refiner.coco.data import FloatArray, GroundTruthFile, IntArray
from iou_refiner.validation.box_formats import EDGE, look_normalised, look_xyxy, sizes_of_images
from iou_refiner.validation.findings import ENOUGH, Example, Finding, level_of

_LARGEST_AREA = 1e10  # square pixels, where the area ranges of pycocotools end


@dataclass(frozen=True, eq=False)
class Annotated:
    """What these checks look at: the columns of an annotation, and which file they come from."""

    truth: GroundTruth
    path: str | Path
    max_examples: int

    def finding(
        self, code: str, wrong: NDArray[np.bool_], message: str, describe: Callable[[int], str] | None = None
    ) -> list[Finding]:
        """The finding of ``code`` at the annotations that a mask selects, or none; ``describe`` says what is there."""
        rows = np.flatnonzero(wrong)
        if not len(rows):
            return []
        describe = describe or (lambda row: f"bbox {self.truth.bbox[row].tolist()}")
        examples = tuple(
            Example(None, int(self.truth.image_id[row]), self.name(row, describe(row)))
            for row in rows[: self.max_examples].tolist()
        )
        return [Finding(code, level_of(code), len(rows), f"{self.path}: {message}", examples)]

    def name(self, row: int, what: str) -> str:
        """An annotation in words, by its place in the file and its id."""
        return f"annotation {self.truth.id[row]} (entry {row + 1:,} counting from 1): {what}"


def check_as_written(file: GroundTruthFile, annotated: Annotated) -> list[Finding]:
    """E407, W402, W240: what stands in the file and not in its columns."""
    rows = file.annotations
    crowd = np.fromiter((row.iscrowd not in (None, 0, 1) for row in rows), np.bool_, len(rows))
    absent = np.fromiter((row.area is None or row.iscrowd is None for row in rows), np.bool_, len(rows))
    ignore = np.fromiter((bool(row.ignore and not row.iscrowd) for row in rows), np.bool_, len(rows))
    return [
        *annotated.finding(
            "E407",
            crowd,
            "iscrowd is neither 0 nor 1. Set 1 for regions that are not judged, 0 for objects.",
            lambda row: f"iscrowd {rows[row].iscrowd}",
        ),
        *annotated.finding(
            "W402",
            absent,
            "annotations lack area or iscrowd, which stops pycocotools; here they count as iscrowd 0 and the bbox's "
            "area. Add them.",
            lambda row: "no " + " and no ".join(k for k in ("area", "iscrowd") if getattr(rows[row], k) is None),
        ),
        *annotated.finding(
            "W240",
            ignore,
            "annotations have ignore without iscrowd, and evaluators go by iscrowd alone. Set iscrowd to 1.",
            lambda row: f"ignore {rows[row].ignore}",
        ),
    ]


def _check_images(annotated: Annotated) -> list[Finding]:
    wrong = [
        image
        for image in annotated.truth.images
        if image.width <= 0 or image.height <= 0 or image.width * image.height > _LARGEST_AREA
    ]
    if not wrong:
        return []
    examples = tuple(Example(None, i.id, f"{i.width} x {i.height}") for i in wrong[: annotated.max_examples])
    message = (
        f"{annotated.path}: images have no size in pixels (a side below 1, or more than {_LARGEST_AREA:.0e} square "
        "pixels). Write the width and height of the image file."
    )
    return [Finding("E410", "error", len(wrong), message, examples)]


def _check_ids(annotated: Annotated) -> list[Finding]:
    ids = annotated.truth.id
    uses = Counter(ids.tolist())
    wrong = (ids == 0) | np.fromiter((uses[number] > 1 for number in ids.tolist()), np.bool_, len(ids))
    message = (
        "annotation ids are 0 or occur twice, which makes pycocotools lose matches; here they are numbered anew. "
        "Number them anew from 1."
    )
    return annotated.finding("W401", wrong, message, lambda row: f"id {ids[row]}")


@np.errstate(over="ignore", invalid="ignore")  # what overflows is told
def _check_boxes(annotated: Annotated) -> list[Finding]:
    boxes = annotated.truth.bbox
    sizes = sizes_of_images(annotated.truth, annotated.truth.image_id)
    low, high = np.minimum(boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), boxes[:, :2] + np.maximum(boxes[:, 2:], 0)
    finite = np.all(np.isfinite(boxes) & np.isfinite(np.tile(high, 2)), axis=1)
    negative = np.any(boxes[:, 2:] < 0, axis=1)
    usable: NDArray[np.bool_] = finite & ~negative & (sizes > 0).all(1)
    empty = (boxes[:, 2:] == 0).any(1)
    away = usable & ((high < 0).any(1) | (low > sizes).any(1))
    beyond = usable & ~away & ((low < -EDGE).any(1) | (high > sizes + EDGE).any(1))
    size = "bbox is [x, y, width, height]"
    return [
        *annotated.finding("E204", ~finite, "boxes reach beyond all numbers. Correct or drop them."),
        *annotated.finding("E403", finite & negative, f"negative width or height. {size}; correct or drop such boxes."),
        *annotated.finding("E404", away, "boxes lie outside of their images, where nothing finds them. Drop them."),
        *annotated.finding("W403", usable & empty, "zero width or height: nothing can match such an object. Drop it."),
        *annotated.finding("W404", beyond, f"boxes reach more than {EDGE:g} pixel beyond their image. Clip them."),
    ]


def _check_format(annotated: Annotated) -> list[Finding]:
    boxes = annotated.truth.bbox
    everything = np.ones(len(boxes), np.bool_)
    if len(boxes) < ENOUGH:
        return []
    if look_normalised(boxes):
        message = "boxes look normalised: no coordinate is above 1.5. Multiply by the image's width and height."
        return annotated.finding("E406", everything, message)
    if look_xyxy(boxes, sizes_of_images(annotated.truth, annotated.truth.image_id)):
        message = "boxes look like [x1, y1, x2, y2]. Write [x, y, width, height]: subtract the first two numbers."
        return annotated.finding("E405", everything, message)
    return []


def _check_areas(annotated: Annotated) -> list[Finding]:
    area, boxes = annotated.truth.area, annotated.truth.bbox
    whole = (boxes[:, 2:] >= 0).all(1)
    with np.errstate(over="ignore"):
        covered = boxes[:, 2] * boxes[:, 3]
    with np.errstate(invalid="ignore"):
        absurd = whole & ~((area >= 0) & (area <= _LARGEST_AREA))
        unlike = whole & ~absurd & (covered > 0) & ((area == 0) | (area > 2 * covered + 1))
    message = (
        f"area is below 0 or above {_LARGEST_AREA:.0e} square pixels: pycocotools leaves such objects out without a "
        "word. Write the object's area in square pixels."
    )
    text = "area is 0 or more than twice that of the bbox; APs, APm and APl go by it. Write it in square pixels."
    return [
        *annotated.finding("E408", absurd, message, lambda row: f"area {area[row]:g}"),
        *annotated.finding("W408", unlike, text, lambda row: f"area {area[row]:g}, bbox {covered[row]:g}"),
    ]


def _check_objects(annotated: Annotated) -> list[Finding]:
    truth = annotated.truth
    if len(truth) and not truth.iscrowd.all():
        return []
    what = "every annotation is a crowd (iscrowd 1)" if len(truth) else "there is no annotation"
    message = f"{annotated.path}: {what}, so there is no object to find and AP cannot be measured."
    return [Finding("W409", "warning", 1, message)]


def _check_duplicates(annotated: Annotated) -> list[Finding]:
    truth = annotated.truth
    columns: list[IntArray | FloatArray] = [truth.image_id, truth.category_id, truth.iscrowd.astype(np.int64)]
    same = repeats([*columns, *truth.bbox.T])
    message = "exact duplicates (same image, category and box): one of them is always missed. Drop them."
    return annotated.finding("W411", same, message)


def repeats(columns: list[IntArray | FloatArray]) -> NDArray[np.bool_]:
    """Which rows are equal to an earlier one in all columns (n,); NaN equals nothing."""
    order = np.lexsort(columns)
    same = np.ones(max(len(order) - 1, 0), np.bool_)
    for column in columns:
        same &= column[order[1:]] == column[order[:-1]]
    result = np.zeros(len(order), np.bool_)
    result[order[1:][same]] = True  # the sort is stable, so the first of equal rows is not among them
    return result


IMAGE_CHECKS: tuple[Callable[[Annotated], list[Finding]], ...] = (_check_images,)
OBJECT_CHECKS: tuple[Callable[[Annotated], list[Finding]], ...] = (
    _check_ids,
    _check_boxes,
    _check_format,
    _check_areas,
    _check_objects,
    _check_duplicates,
)
