"""The row about Soft-NMS, against that of ensemble-boxes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from ensemble_boxes import soft_nms as ensemble_soft_nms

from iou_refiner.stage.soft_nms import soft_nms
from scripts.bench.work import Work, clusters, ensure
from tests.kit.reference import soft_nms_reference


def soft_suppression(device: torch.device) -> Iterator[Work]:
    """On the CPU, whatever the device: ensemble-boxes knows no other."""
    boxes, scores, _, labels = clusters(1000)
    boxes = boxes.clamp(min=0) / 2000  # it wants [0, 1]

    def theirs() -> Any:
        columns = [boxes.numpy()], [scores.numpy()], [labels.numpy()]
        return ensemble_soft_nms(*columns, method=2, sigma=0.5, iou_thr=0.5, thresh=1e-3)

    def check() -> None:
        keep, ours = soft_nms(boxes, scores, labels)
        # The boxes it keeps can be compared. The scores it returns are not the decayed ones: ours go to the oracle.
        ensure(len(keep) == len(theirs()[0]))
        corners = [tuple(box) for box in boxes.tolist()]
        exact = soft_nms_reference(
            corners, scores.tolist(), labels.tolist(), lambda iou: math.exp(-(iou**2) / 0.5), 1e-3
        )
        ensure(bool(np.allclose(ours.numpy(), np.array(exact)[keep.numpy()], rtol=1e-5, atol=0)))

    ours = partial(soft_nms, boxes, scores, labels)
    yield Work("soft_nms, 1000 boxes of 80 classes", "ensemble-boxes", 0.2, ours, theirs, check)
