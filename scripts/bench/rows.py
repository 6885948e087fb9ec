"""What bench.py measures: each row names the work, its peer, its limit, and how its result is checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import batched_nms

from iou_refiner import Detections, IoUPredictor, Stage
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.pooling.functional import assign_levels
from iou_refiner.stage.ascent import refine_boxes
from iou_refiner.stage.nms import iou_guided_nms, nms, soft_nms
from scripts.bench.pooling import align, encoding, pooling
from scripts.bench.rescore import rescoring
from scripts.bench.work import BINS, HEIGHT, STRIDES, WIDTH, Work, clusters, coco_boxes, ensure, lively, random_maps
from tests.kit.reference import soft_nms_reference


def refinement(device: torch.device) -> Iterator[Work]:
    maps, boxes = random_maps(256, (*STRIDES, 64.0), device), coco_boxes(100).to(device)
    torch.manual_seed(0)
    head = lively(IoUPredictor((256,) * 5, maps.strides)).to(device)
    index = torch.zeros(100, dtype=torch.int64, device=device)
    with torch.no_grad():
        pyramid = head.encode(maps)
    box_head = nn.Sequential(nn.Linear(256 * BINS**2, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()).to(device)
    level = assign_levels(boxes, STRIDES)

    def ours() -> Any:  # tolerance 0: every box goes all five steps
        return refine_boxes(lambda b, r: head.worth(pyramid, b, index[r]), boxes, steps=5, tolerance=0.0)

    @torch.no_grad()
    def theirs() -> Tensor:
        return box_head(torch.cat(align(maps.levels[:4], STRIDES, boxes, level)).flatten(1))

    def check() -> None:
        found = ours()
        ensure(found.forwards == 6 and bool((found.score >= found.start_score).all()) and int(found.moved.sum()) > 50)

    yield Work("refine 100 boxes, 5 steps", "roi_align + 2 x FC1024", 1.5, ours, theirs, check)


def whole_stage(name: str, limit: float, device: torch.device) -> Iterator[Work]:
    model = getattr(detection, name)(weights=None, weights_backbone=None).to(device).eval()
    size = (HEIGHT, WIDTH) if "resnet" in name else (320, 427)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    maps, _, _ = TorchvisionAdapter(model).extract([image])
    boxes, scores, _, labels = clusters(1000)
    boxes = (boxes * (size[0] / HEIGHT)).clamp(min=0).to(device)
    given = Detections(boxes, scores.to(device), labels.to(device))
    torch.manual_seed(0)
    stage = Stage(lively(IoUPredictor(maps.channels, maps.strides)).to(device))

    def check() -> None:
        (found,) = stage(maps, [given])
        ensure(0 < len(found) <= 100 and stage.summary.moved > 10 and bool(torch.isfinite(found.boxes).all()))

    yield Work(
        f"whole stage, 1000 candidates, on {name}", "the detector, with its own suppression", limit,
        lambda: stage(maps, [given]), torch.no_grad()(lambda: model([image])), check,
    )  # fmt: skip


def suppression(device: torch.device) -> Iterator[Work]:
    for count, limit in ((1000, 1.5), (10_000, 2.5), (100_000, 4.0)):
        boxes, scores, ranks, labels = (column.to(device) for column in clusters(count))
        peer = partial(batched_nms, boxes, ranks, labels, 0.5)
        yield Work(
            f"iou_guided_nms, {count} boxes of 80 classes", "torchvision batched_nms", limit,
            partial(iou_guided_nms, boxes, scores, ranks, labels), peer,
            lambda b=boxes, r=ranks, la=labels, p=peer: ensure(torch.equal(nms(b, r, la), p())),
        )  # fmt: skip
    from ensemble_boxes import soft_nms as ensemble

    boxes, scores, _, labels = clusters(1000)
    boxes = boxes.clamp(min=0) / 2000  # it wants [0, 1]

    def theirs() -> Any:
        columns = [boxes.numpy()], [scores.numpy()], [labels.numpy()]
        return ensemble(*columns, method=2, sigma=0.5, iou_thr=0.5, thresh=1e-3)

    def check() -> None:
        keep, ours = soft_nms(boxes, scores, labels)
        # Its kept boxes can be compared; the scores it returns are not the decayed ones, so ours go to the oracle.
        ensure(len(keep) == len(theirs()[0]))
        places = [tuple(box) for box in boxes.tolist()]
        exact = soft_nms_reference(
            places, scores.tolist(), labels.tolist(), lambda iou: math.exp(-(iou**2) / 0.5), 1e-3
        )
        ensure(bool(np.allclose(ours.numpy(), np.array(exact)[keep.numpy()], rtol=1e-5, atol=0)))

    yield Work(
        "soft_nms, 1000 boxes of 80 classes", "ensemble-boxes", 0.2,
        partial(soft_nms, boxes, scores, labels), theirs, check,
    )  # fmt: skip


def rows(device: torch.device, only: str) -> Iterator[Work]:
    """All rows of the groups whose name holds ``only``; a group is built when its turn comes."""
    groups = {
        "pool": lambda: (
            work
            for channels, strides, count, limit in (
                (256, STRIDES, 100, 0.28),
                (256, STRIDES, 1000, 0.28),
                (1024, (16.0,), 300, 0.2),
            )
            for work in pooling(channels, strides, count, limit, device)
        ),
        "refine": lambda: refinement(device),
        "nms": lambda: suppression(device),
        "stage mobilenet": lambda: whole_stage("fasterrcnn_mobilenet_v3_large_320_fpn", 0.25, device),
        "stage resnet": lambda: whole_stage("fasterrcnn_resnet50_fpn", 0.1, device),
        "encode": lambda: encoding(device),
        "rescore": lambda: rescoring(device),
    }
    for group, build in groups.items():
        if only in group:
            yield from build()
