"""Whole data sets: candidates of a detector to COCO results, and COCO results to better ones.

Both go over the images of an annotation file and yield the results of one image at a time, so memory does not grow with
the number of images. Where features come from is the caller's choice: the live detector or a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iou_refiner.boxes import clip_boxes
from iou_refiner.checks import DataError, did_you_mean
from iou_refiner.coco import GroundTruth, Image, Results, xywh_to_xyxy, xyxy_to_xywh
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.stage.stage import Stage
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


def dump_candidates(
    source: FeatureSource, category_ids: Mapping[int, int] | None, ground_truth: GroundTruth, *, top: int = 1000
) -> Iterator[Results]:
    """A detector's candidates before suppression as COCO results, one image at a time.

    Only categories of the annotation are kept, and of each image the ``top`` candidates by score.
    """
    shared = category_map(category_ids, ground_truth)
    labels = torch.tensor(sorted(shared), dtype=torch.int64)
    for image in ground_truth.images:
        extraction = source(image)
        candidates = extraction.candidates.to("cpu")
        candidates = candidates[torch.isin(candidates.labels, labels)]
        candidates = candidates[candidates.scores.argsort(descending=True, stable=True)[:top]]
        yield to_results(image, extraction, candidates, shared)


def rescore(
    source: FeatureSource,
    category_ids: Mapping[int, int] | None,
    stage: Stage,
    results: Results,
    ground_truth: GroundTruth,
    images: Iterable[Image] | None = None,
) -> Iterator[Results]:
    """Put saved results through the stage, one image at a time.

    Every record is counted in the summary of the stage: those that came in are those that come out, were suppressed, or
    were dropped (outside of the image, empty, not finite, beyond ``max_candidates``). Records keep their other keys,
    except ``segmentation`` where boxes are refined: the mask would no longer fit.

    Args:
        source: of the features.
        category_ids: of the adapter.
        stage: what to do with the boxes.
        results: COCO results of any detector on these images; best before suppression.
        ground_truth: the annotation; only its images and categories are read.
        images: those to rescore; default all of the annotation.

    Raises:
        DataError: a record names an image or category that the annotation or the detector does not have.
    """
    shared = category_map(category_ids, ground_truth)
    label_of = {category: label for label, category in shared.items()}
    _check_known("image", results.image_id, [image.id for image in ground_truth.images])
    _check_known("category", results.category_id, label_of)
    rows_of = results.by_image()
    for image in ground_truth.images if images is None else images:
        rows = rows_of.get(image.id)
        if rows is None:
            continue
        extraction = source(image)
        part = results[rows]
        boxes = torch.from_numpy(xywh_to_xyxy(part.bbox))
        candidates = Detections(
            boxes=extraction.transform.to_network(boxes).float(),
            scores=torch.from_numpy(part.score).float(),
            labels=torch.tensor([label_of[int(c)] for c in part.category_id], dtype=torch.int64),
            source=torch.arange(len(part)),
        )
        (detections,) = stage(extraction.features, [candidates])
        better = _clipped(image, extraction, detections.to("cpu"), shared, _other_keys(part, stage, detections))
        yield better[_placed(better, part, detections, stage)]


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
    results = _clipped(image, extraction, detections, category_of, extra)
    return results[_has_size(results)]


def _clipped(
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


def _has_size(results: Results) -> NDArray[np.bool_]:
    """Mask (n,) of the records that are finite and have a width and a height."""
    boxes = results.bbox
    return np.asarray(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1), np.bool_)


def _placed(better: Results, part: Results, detections: Detections, stage: Stage) -> NDArray[np.bool_]:
    """Mask of the records to write; the others are counted as empty, or as outside of the image."""
    mask = _has_size(better)
    if not mask.all() and detections.source is not None:
        records = part.bbox[detections.source.cpu().numpy()[~mask]]
        empty = int((records[:, 2:] <= 0).any(1).sum())
        stage.summary.drop(empty=empty, outside=len(records) - empty)
    return mask


def _other_keys(part: Results, stage: Stage, detections: Detections) -> tuple[dict[str, Any], ...] | None:
    if part.extra is None or detections.source is None:
        return None
    dropped = {"segmentation"} if stage.settings.refines else set()
    extra = part.extra
    return tuple({k: v for k, v in extra[int(row)].items() if k not in dropped} for row in detections.source)


def _check_known(what: str, ids: np.ndarray, known: Iterable[int]) -> None:
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
