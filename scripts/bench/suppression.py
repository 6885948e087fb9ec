"""The rows about suppression: IoU-guided NMS against torchvision's greedy NMS of compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torchvision.ops import batched_nms

from iou_refiner.stage.nms import iou_guided_nms, nms
from scripts.bench.work import Work, clusters, ensure


def suppression(device: torch.device) -> Iterator[Work]:
    for count, limit in ((1000, 1.5), (10_000, 2.5), (100_000, 4.0)):
        boxes, scores, ranking, labels = (column.to(device) for column in clusters(count))
        theirs = partial(batched_nms, boxes, ranking, labels, 0.5)
        greedy = partial(nms, boxes, ranking, labels)
        yield Work(
            f"iou_guided_nms, {count} boxes of 80 classes", "torchvision batched_nms", limit,
            partial(iou_guided_nms, boxes, scores, ranking, labels), theirs,
            lambda greedy=greedy, theirs=theirs: ensure(torch.equal(greedy(), theirs())),
        )  # fmt: skip
