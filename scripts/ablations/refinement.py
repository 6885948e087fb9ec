"""The two ways to refine boxes, each on its own and on all boxes it is given: one image, no suppression."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iou_refiner.boxes import clip_boxes
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.ascent import refine_boxes
from iou_refiner.structures import Detections, FeatureMaps

#: From the feature maps of an image and its N candidates to other boxes (N, 4).
Refine = Callable[[FeatureMaps, Detections], Tensor]

_FIVE_STEPS = partial(refine_boxes, steps=5, step_size=0.05)


def regress(head: IoUHead, features: FeatureMaps, candidates: Detections) -> Tensor:
    """Boxes (N, 4) after one step of regression."""
    table = _encode(head, features)
    boxes = head.regress(table, candidates.boxes, torch.zeros_like(candidates.labels), candidates.labels)
    return clip_boxes(boxes, features.image_sizes[0])


def ascend(
    head: IoUHead,
    features: FeatureMaps,
    candidates: Detections,
    *,
    rank_by: str = "ranking",
    ascent: Callable[..., Any] = _FIVE_STEPS,
) -> Tensor:
    """Boxes (N, 4) after an ascent, by default of five steps of .05, on the head's "ranking" or its "iou"."""
    table, level = _encode(head, features), head.finest_level(candidates.boxes)

    def score(boxes: Tensor, rows: Tensor) -> Tensor:
        prediction = head(table, boxes, torch.zeros_like(rows), candidates.labels[rows], level[rows])
        return getattr(prediction, rank_by)

    return clip_boxes(ascent(score, candidates.boxes).boxes, features.image_sizes[0])


@torch.no_grad()
def _encode(head: IoUHead, features: FeatureMaps) -> Any:
    return head.encode(features)
