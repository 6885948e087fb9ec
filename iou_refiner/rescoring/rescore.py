"""Saved results through the stage, with the detector's features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iou_refiner.coco import GroundTruth, Image, Results, xywh_to_xyxy
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.rescoring.records import category_map, check_known, clipped, has_size
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections


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
    check_known("image", results.image_id, [image.id for image in ground_truth.images])
    check_known("category", results.category_id, label_of)
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
        better = clipped(image, extraction, detections.to("cpu"), shared, other_keys(part, stage, detections))
        yield better[placed(better, part, detections, stage)]


def placed(better: Results, part: Results, detections: Detections, stage: Stage) -> NDArray[np.bool_]:
    """Mask of the records to write; the others are counted as empty, or as outside of the image."""
    mask = has_size(better)
    if not mask.all() and detections.source is not None:
        records = part.bbox[detections.source.cpu().numpy()[~mask]]
        empty = int((records[:, 2:] <= 0).any(1).sum())
        stage.summary.drop(empty=empty, outside=len(records) - empty)
    return mask


def other_keys(part: Results, stage: Stage, detections: Detections) -> tuple[dict[str, Any], ...] | None:
    """The other keys of the records that detections come from, without masks that no longer fit."""
    if part.extra is None or detections.source is None:
        return None
    dropped = {"segmentation"} if stage.settings.refines else set()
    extra = part.extra
    return tuple({k: v for k, v in extra[int(row)].items() if k not in dropped} for row in detections.source)
