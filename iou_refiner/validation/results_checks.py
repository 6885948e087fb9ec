"""What is wrong with the columns of a results file, on its own and held against its ground truth."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import shown
from iou_refiner.coco import xywh_to_xyxy
from iou_refiner.coco.data import FloatArray, IntArray, group_rows
from iou_refiner.validation.annotation_checks import repeats
from iou_refiner.validation.box_formats import EDGE, check_fit, look_normalised, look_xyxy, sizes_of_images
from iou_refiner.validation.findings import ENOUGH, Example, Finding, Subject, about_file

_PER_IMAGE = 100  # what COCO's server and evaluators keep of an image
_LARGEST_AREA = 1e10  # square pixels, where the area ranges of pycocotools end


def _check_sizes(subject: Subject) -> list[Finding]:
    size = subject.results.bbox[:, 2:]
    negative = np.any(size < 0, axis=1)
    empty = (size == 0).any(1) & ~negative
    sides = np.flatnonzero((size >= _LARGEST_AREA**0.5).any(1))  # the few that can be too large
    with np.errstate(over="ignore"):
        large = sides[(size[sides, 0] * size[sides, 1] > _LARGEST_AREA) & ~negative[sides]]
    ignored = (
        f"boxes of more than {_LARGEST_AREA:.0e} square pixels, which pycocotools leaves out without a word. Drop them."
    )
    return [
        *subject.finding("E205", np.flatnonzero(negative), "negative width or height. bbox is [x, y, width, height]."),
        *subject.finding("E207", large, ignored),
        *subject.finding("W205", np.flatnonzero(empty), "zero width or height: such a box can match nothing. Drop it."),
    ]


def _first(ids: NDArray[Any]) -> str:
    return ", ".join(map(str, ids[:5].tolist())) + (", ..." if len(ids) > 5 else "")


def _check_image_ids(subject: Subject) -> list[Finding]:
    if subject.truth is None:
        return []
    known = np.array([image.id for image in subject.truth.images], np.int64)
    rows = np.flatnonzero(~np.isin(subject.results.image_id, known))
    unknown = np.unique(subject.results.image_id[rows])
    message = f"image ids that the ground truth does not have ({_first(unknown)}). {_guess_image_ids(subject, unknown)}"
    return subject.finding("E301", rows, message, lambda row: f"image_id {subject.results.image_id[row]}")


def _guess_image_ids(subject: Subject, unknown: IntArray) -> str:
    images = subject.truth.images if subject.truth else ()
    stems = [re.search(r"(\d+)\.\w+$", image.file_name) for image in images]
    numbers = np.array([int(stem[1]) for stem in stems if stem and len(stem[1]) < 19], np.int64)
    if len(unknown) and np.isin(unknown, numbers).all():
        return "They look like file name stems: look up the id of the image with that file name."
    if len(unknown) and subject.results.image_id.min() >= 0 and subject.results.image_id.max() <= len(images):
        return "They look like positions in the image list: write the id of the image at that position."
    return "Is this the ground truth of the same split?"


def _check_category_ids(subject: Subject) -> list[Finding]:
    if subject.truth is None:
        return []
    known = np.array(sorted(category.id for category in subject.truth.categories), np.int64)
    rows = np.flatnonzero(~np.isin(subject.results.category_id, known))
    unknown = np.unique(subject.results.category_id[rows])
    message = (
        f"category ids that the ground truth does not have ({_first(unknown)}). {_guess_categories(subject, known)}"
    )
    return subject.finding("E302", rows, message, lambda row: f"category_id {subject.results.category_id[row]}")


def _guess_categories(subject: Subject, known: IntArray) -> str:
    if not len(known) or not len(subject.results):
        return "The ground truth lists no categories." if not len(known) else ""
    low, high = int(subject.results.category_id.min()), int(subject.results.category_id.max())
    span = f"yours are {low}..{high}, its {len(known)} are {known[0]}..{known[-1]}"
    gaps = known[-1] - known[0] + 1 != len(known)
    if low == 0 and high < len(known) and known[0] == 1 and not gaps:
        return f"They look off by one ({span}): add 1."
    if low >= 0 and high < len(known) + min(low, 1):
        return f"They look like contiguous labels ({span}{' with gaps' if gaps else ''}): write the category's own id."
    return f"Is this the ground truth of the same classes ({span})?"


def _check_scores(subject: Subject) -> list[Finding]:
    findings = _check_unit_range(subject, "score", subject.results.score)
    if subject.results.iou is not None:
        findings += _check_unit_range(subject, "iou", subject.results.iou)
    return findings


def _check_unit_range(subject: Subject, name: str, values: FloatArray) -> list[Finding]:
    rows = np.flatnonzero((values < 0) | (values > 1))
    if (values < 0).any():
        guess = "They look like logits: apply the sigmoid or softmax."
    elif (values <= 100).all():
        guess = "They look like percent: divide by 100."
    else:
        guess = "Bring them to [0, 1]."
    return subject.finding("E303", rows, f"{name} outside [0, 1]. {guess}", lambda row: f"{name} {values[row]:g}")


def _check_box_format(subject: Subject) -> list[Finding]:
    boxes = subject.results.bbox
    if len(boxes) < ENOUGH:
        return []
    if look_normalised(boxes):
        message = "boxes look normalised: no coordinate is above 1.5. Multiply by the image's width and height."
        return subject.finding("E502", np.arange(len(boxes)), message)
    findings = []
    if look_xyxy(boxes, sizes_of_images(subject.truth, subject.results.image_id)):
        message = "boxes look like [x1, y1, x2, y2]. Write [x, y, width, height]: subtract the first two numbers."
        findings += subject.finding("E501", np.arange(len(boxes)), message)
    return findings


def _check_frame(subject: Subject) -> list[Finding]:
    sizes = sizes_of_images(subject.truth, subject.results.image_id)
    with np.errstate(over="ignore", invalid="ignore"):
        corners = xywh_to_xyxy(subject.results.bbox)
    outside = (corners[:, :2] < -EDGE).any(1) | (corners[:, 2:] > sizes + EDGE).any(1)
    rows = np.flatnonzero(outside)
    if not len(rows):
        return []
    message = f"boxes reach more than {EDGE:g} pixel beyond their image. Clip them if the detector did not mean to."
    findings = subject.finding("W206", rows, message)
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = (corners[:, 2:] / sizes).max(1)  # NaN where the image is unknown
    known = np.flatnonzero(np.isfinite(reach))
    groups = group_rows(subject.results.image_id[known])
    factors = np.array([reach[known[group]].max() for group in groups.values()])
    if len(known) >= ENOUGH and (factors > 1.05).mean() >= 0.5 and outside.mean() >= 0.1:
        low, middle, high = np.quantile(factors, [0.25, 0.5, 0.75])
        text = f"boxes reach beyond their images by a factor of about {middle:.2f} (quartiles {low:.2f}, {high:.2f})"
        findings += subject.finding("E503", rows, f"{text}: a resized frame? Scale them back to the original image.")
    return findings


def _check_duplicates(subject: Subject) -> list[Finding]:
    results = subject.results
    rows = np.flatnonzero(repeats([results.image_id, results.category_id, results.score, *results.bbox.T]))
    message = "exact duplicates (same image, class, box and score), each a false positive. Drop them."
    return subject.finding("W210", rows, message)


def _check_images(subject: Subject) -> list[Finding]:
    findings = []
    ids, counts = np.unique(subject.results.image_id, return_counts=True)
    many = np.flatnonzero(counts > _PER_IMAGE)
    if len(many):
        message = (
            f"images with more than {_PER_IMAGE} records: pycocotools keeps {_PER_IMAGE} per image and category, "
            f"the COCO server {_PER_IMAGE} per image. Say which is meant when comparing."
        )
        examples = tuple(Example(None, int(ids[at]), f"{counts[at]:,} records") for at in many[: subject.max_examples])
        findings.append(Finding("W211", "warning", len(many), message, examples))
    if subject.truth is not None:
        seen = set(ids.tolist())
        empty = [image.id for image in subject.truth.images if image.id not in seen]
        if empty:
            message = "images without detections; they count as missed. Was the whole split run?"
            examples = tuple(Example(None, image, "no record") for image in empty[: subject.max_examples])
            findings.append(Finding("W212", "warning", len(empty), message, examples))
    return findings


def _check_rounding(subject: Subject) -> list[Finding]:
    boxes, scores = subject.results.bbox, subject.results.score
    findings: list[Finding] = []
    if len(boxes) < ENOUGH:
        return findings
    if (boxes == np.round(boxes)).all():
        message = "all boxes are whole pixels, which costs about .3 points of AP75. Save two decimals."
        findings.append(about_file("W213", message))
    if np.abs(scores - np.round(scores, 2)).max() < 1e-9:
        message = "scores have at most two decimals, so many tie and their order is lost. Save five or six."
        findings.append(about_file("W214", message))
    return findings


def _check_keys(subject: Subject) -> list[Finding]:
    findings = []
    if count := subject.keys["segmentation"]:
        message = "records with a segmentation: it no longer fits a box that moves, so refinement drops it."
        findings.append(Finding("W230", "warning", count, message))
    names = sorted(key for key in subject.keys if key != "segmentation")
    if names:
        some = ", ".join(shown(name, 40) for name in names[:10]) + (", ..." if len(names) > 10 else "")
        message = f"records have other keys, which are kept: {some}."
        findings.append(Finding("W250", "warning", max(subject.keys[key] for key in names), message))
    return findings


COLUMN_CHECKS: tuple[Callable[[Subject], list[Finding]], ...] = (
    _check_sizes,
    _check_image_ids,
    _check_category_ids,
    _check_scores,
    _check_box_format,
    _check_frame,
    check_fit,
    _check_duplicates,
    _check_images,
    _check_rounding,
    _check_keys,
)
