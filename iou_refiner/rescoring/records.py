"""Detections of an image and COCO records, one to the other, and which categories both sides know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.boxes import clip_boxes
from iou_refiner.checks import DataError, did_you_mean
from iou_refiner.coco import GroundTruth, Image, Results, xyxy_to_xywh
from iou_refiner.detector.features import Extraction
from iou_refiner.structures import Detections


def category_map(category_ids: Mapping[int, int] | None, ground_truth: GroundTruth) -> dict[int, int]:
    """Category id of each of the detector's labels that the annotation knows.

    Args:
        category_ids: of the adapter: id of each label, or None where labels are ids.
        ground_truth: the annotation.

    Raises:
        DataError: detector and annotation share no category.
    """
    known = [category.id for category in ground_truth.categories]
    mapping = {i: i for i in known} if category_ids is None else dict(category_ids)
    shared = {label: category for label, category in mapping.items() if category in known}
    if not shared:
        raise DataError(
            f"The detector and the annotation share no category: the detector has {_some(mapping.values())}, "
            f"the annotation {_some(known)}. Give the adapter `category_ids`, a dict from its labels to these ids."
        )
    return shared


def to_results(
    image: Image,
    extraction: Extraction,
    detections: Detections,
    category_of: Mapping[int, int],
    extra: tuple[dict[str, Any], ...] | None = None,
) -> Results:
    """Detections in network pixels as COCO records of an image; boxes outside of it are left out.

    Args:
        image: of the annotation.
        extraction: its transform.
        detections: N detections.
        category_of: category id of each label, from :func:`category_map`.
        extra: other keys of each record.
    """
    results = clipped(image, extraction, detections, category_of, extra)
    return results[has_size(results)]


def clipped(
    image: Image,
    extraction: Extraction,
    detections: Detections,
    category_of: Mapping[int, int],
    extra: tuple[dict[str, Any], ...] | None = None,
) -> Results:
    """The same with a record for every detection: a box outside of the image comes out without a size."""
    boxes = extraction.transform.to_image(detections.boxes.double())
    boxes = clip_boxes(boxes, (image.height, image.width))
    return Results(
        image_id=np.full(len(detections), image.id, dtype=np.int64),
        category_id=np.array([category_of[int(label)] for label in detections.labels], dtype=np.int64),
        bbox=xyxy_to_xywh(boxes.numpy()),
        score=detections.scores.double().numpy(),
        iou=None if detections.ious is None else detections.ious.double().numpy(),
        extra=extra,
    )


def has_size(results: Results) -> NDArray[np.bool_]:
    """Mask (n,) of the records that are finite and have a width and a height."""
    boxes = results.bbox
    return np.asarray(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1), np.bool_)


def check_known(what: str, ids: np.ndarray, known: Iterable[int]) -> None:
    """Raise DataError for the first record whose image or category id is not known."""
    known = list(known)
    unknown = ~np.isin(ids, known)
    if unknown.any():
        row = int(unknown.argmax())
        raise DataError(
            f"Record {row + 1:,} counting from 1: no {what} {ids[row]} in the annotation (or the detector); it has "
            f"{_some(known)}.{did_you_mean(str(ids[row]), map(str, known))} See: iou-refiner validate"
        )


def _some(ids: Iterable[int]) -> str:
    ids = sorted(ids)
    return ", ".join(map(str, ids[:5])) + (f", ... {ids[-1]} ({len(ids)} in all)" if len(ids) > 5 else "")
