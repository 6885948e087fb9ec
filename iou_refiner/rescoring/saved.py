"""Saved results through the stage of a head without features: no detector, no images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from iou_refiner.coco import Results, xywh_to_xyxy, xyxy_to_xywh
from iou_refiner.coco.data import spread_rows
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.rescoring.rescore import other_keys, placed
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.likeness import check_likeness, likeness
from iou_refiner.stage.by_siblings import clusters_of_image
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections

# Images that go through the network together, and those that tell what the candidates of a file are like.
_TOGETHER, _LOOKED_AT = 16, 500


def saved_candidates(results: Results) -> Detections:
    """The records of one image as boxes in its own pixels, the category id as label, the row as ``source``."""
    return Detections(
        boxes=torch.from_numpy(xywh_to_xyxy(results.bbox)).float(),
        scores=torch.from_numpy(results.score).float(),
        labels=torch.from_numpy(results.category_id),
        source=torch.arange(len(results)),
    )


def check_saved(head: SiblingHead, results: Results, what: str) -> None:
    """Raise DataError where candidates, called ``what``, are unlike those that a head was trained on."""
    if len(results):
        check_likeness(head.metadata.candidates, saved_likeness(results, head.siblings.config), what)


def stage_without_detector(head: SiblingHead, settings: StageSettings | None = None, **changes: Any) -> Stage:
    """The stage for saved candidates; what it does not judge gets a greedy NMS at the threshold best on val.

    Args, Raises: as :class:`Stage`.
    """
    return Stage(head, settings, own_threshold=head.metadata.training.get("nms_threshold", 0.5), **changes)


def rescore_saved(stage: Stage, results: Results) -> Iterator[Results]:
    """Put saved results through the stage of a head without features, one image at a time.

    An image reaches as far as the candidates in it do; boxes come out within it. Records are counted, and keep their
    other keys, as by :func:`~iou_refiner.rescoring.rescore`.

    Args:
        stage: of a :class:`~iou_refiner.head.sibling_head.SiblingHead`.
        results: COCO results from before suppression.
    """
    images = list(results.by_image().values())
    for start in range(0, len(images), _TOGETHER):
        parts = [results[rows] for rows in images[start : start + _TOGETHER]]
        for part, detections in zip(parts, stage(None, [saved_candidates(part) for part in parts]), strict=True):
            better = Results(
                image_id=np.full(len(detections), part.image_id[0], dtype=np.int64),
                category_id=detections.labels.numpy(),
                bbox=xyxy_to_xywh(detections.boxes.double().numpy()),
                score=detections.scores.double().numpy(),
                iou=None if detections.ious is None else detections.ious.double().numpy(),
                extra=other_keys(part, stage, detections),
            )
            yield better[placed(better, part, detections, stage)]


def saved_likeness(results: Results, config: SiblingConfig) -> dict[str, Any]:
    """What the candidates of a file are like (:mod:`iou_refiner.siblings.likeness`), from a bounded number of images.

    Args:
        results: candidates; of none nothing is said.
        config: of the network that will look at them.
    """
    if not len(results):
        return {}
    images = list(results.by_image().values())
    crowding = []
    for row in spread_rows(len(images), _LOOKED_AT):
        image = saved_candidates(results[images[row]])
        crowding.append(clusters_of_image(image.boxes, image.scores, image.labels, config).crowd_above_70)
    return likeness(results.score, float(torch.cat(crowding).mean()))
