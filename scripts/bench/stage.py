"""The rows about the ascent, and about the whole stage on a detector."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import detection

from iou_refiner import Detections, IoUHead, Stage
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.pooling.functional import assign_levels
from iou_refiner.stage.ascent import Refinement, refine_boxes
from scripts.bench.pooling import align
from scripts.bench.work import BINS, HEIGHT, STRIDES, WIDTH, Work, clusters, coco_boxes, ensure, lively, random_maps


def refinement(device: torch.device) -> Iterator[Work]:
    """The ascent against a box head like that of an R-CNN."""
    maps, boxes = random_maps(256, (*STRIDES, 64.0), device), coco_boxes(100).to(device)
    torch.manual_seed(0)
    head = lively(IoUHead(maps.channels, maps.strides)).to(device)
    index = torch.zeros(100, dtype=torch.int64, device=device)
    with torch.no_grad():
        table = head.encode(maps)
    box_head = nn.Sequential(nn.Linear(256 * BINS**2, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()).to(device)
    level = assign_levels(boxes, STRIDES)

    def score(boxes: Tensor, rows: Tensor) -> Tensor:
        return head(table, boxes, index[rows]).ranking

    def ours() -> Refinement:  # tolerance 0: every box goes all five steps
        return refine_boxes(score, boxes, steps=5, tolerance=0.0)

    @torch.no_grad()
    def theirs() -> Tensor:
        return box_head(torch.cat(align(maps.levels[:4], STRIDES, boxes, level)).flatten(1))

    def check() -> None:
        refined = ours()
        ensure(refined.forwards == 6 and int(refined.moved.sum()) > 50)
        ensure(bool((refined.score >= refined.start_score).all()))

    yield Work("refine 100 boxes, 5 steps", "roi_align + 2 x FC1024", 1.5, ours, theirs, check)


def on_detector(name: str, size: tuple[int, int], limit: float, device: torch.device) -> Iterator[Work]:
    """The stage against the detector it refines."""
    model = getattr(detection, name)(weights=None, weights_backbone=None).to(device).eval()
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    maps, _, _ = TorchvisionAdapter(model).extract([image])
    boxes, scores, _, labels = clusters(1000)
    boxes = (boxes * (size[0] / HEIGHT)).clamp(min=0).to(device)
    candidates = [Detections(boxes, scores.to(device), labels.to(device))]
    torch.manual_seed(0)
    stage = Stage(lively(IoUHead(maps.channels, maps.strides)).to(device))

    def check() -> None:
        (detections,) = stage(maps, candidates)
        ensure(0 < len(detections) <= 100 and stage.summary.moved > 10)
        ensure(bool(torch.isfinite(detections.boxes).all()))

    yield Work(
        f"whole stage, 1000 candidates, on {name}", "the detector, with its own suppression", limit,
        partial(stage, maps, candidates), torch.no_grad()(partial(model, [image])), check,
    )  # fmt: skip


def on_mobilenet(device: torch.device) -> Iterator[Work]:
    return on_detector("fasterrcnn_mobilenet_v3_large_320_fpn", (320, 427), 0.25, device)


def on_resnet(device: torch.device) -> Iterator[Work]:
    return on_detector("fasterrcnn_resnet50_fpn", (HEIGHT, WIDTH), 0.1, device)
