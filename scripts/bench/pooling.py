"""The rows about pooling: from a table prepared once, against torchvision's roi_align from the maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from iou_refiner import FeatureMaps, FeatureTable, IoUHead, prroi_pool
from iou_refiner.pooling.functional import assign_levels
from scripts.bench.work import BINS, STRIDES, Work, coco_boxes, ensure, random_maps
from tests.kit.reference import prroi_pool_reference


def align(levels: Sequence[Tensor], strides: Sequence[float], boxes: Tensor, level: Tensor) -> list[Tensor]:
    """Boxes pooled by roi_align, level by level."""
    return [
        roi_align(feature, [boxes[level == index]], BINS, 1 / stride, 2, True)
        for index, (feature, stride) in enumerate(zip(levels, strides, strict=True))
    ]


@dataclass(frozen=True)
class Scene:
    """Boxes, each to be pooled from one level of random maps."""

    maps: FeatureMaps
    boxes: Tensor

    @cached_property
    def level(self) -> Tensor:
        return assign_levels(self.boxes, self.maps.strides)

    @cached_property
    def table(self) -> FeatureTable:
        return FeatureTable.from_maps(self.maps)

    @property
    def name(self) -> str:
        layout = "FPN" if len(self.maps.strides) > 1 else "stride 16"
        return f"{layout}, C {self.maps.channels[0]}, {len(self.boxes)} boxes"

    def pool(self, boxes: Tensor | None = None) -> Tensor:
        return prroi_pool(self.table, self.boxes if boxes is None else boxes, level=self.level)

    def align(self) -> list[Tensor]:
        return align(self.maps.levels, self.maps.strides, self.boxes, self.level)


def pooling(device: torch.device) -> Iterator[Work]:
    """Many channels on few boxes and the other way round, with gradients where an FPN has them."""
    for channels, strides, count, limit in (
        (256, STRIDES, 100, 0.28),
        (256, STRIDES, 1000, 0.28),
        (1024, (16.0,), 300, 0.2),
    ):
        scene = Scene(random_maps(channels, strides, device), coco_boxes(count).to(device))
        yield forward(scene, limit)
        if channels == 256:
            yield box_gradient(scene)
        if count == 1000:
            yield table(scene)
        if len(strides) == 1:
            yield view(scene)


def forward(scene: Scene, limit: float) -> Work:
    def check() -> None:
        pooled = scene.pool()
        for row in range(0, len(scene.boxes), len(scene.boxes) // 3):
            level = int(scene.level[row])
            feature = scene.maps.levels[level][0, :2].double().cpu().numpy()
            cells = scene.boxes[row].double().cpu().numpy() / scene.maps.strides[level] - 0.5
            error = np.abs(pooled[row, :2].cpu().numpy() - prroi_pool_reference(feature, cells, BINS)).max()
            ensure(error <= 2e-6 * np.ptp(feature))

    return Work(f"pool forward, {scene.name}", "roi_align, 2 samples", limit, scene.pool, scene.align, check)


def box_gradient(scene: Scene) -> Work:
    strides, boxes, channels = scene.maps.strides, scene.boxes, scene.maps.channels[0]
    levels = tuple(feature.clone().requires_grad_() for feature in scene.maps.levels)
    aligned, moving = align(levels, strides, boxes, scene.level), boxes.clone().requires_grad_()
    upstream = torch.randn(len(boxes), channels, BINS, BINS, device=boxes.device)
    upstream = upstream.to(memory_format=torch.channels_last)
    parts = [upstream[scene.level == index].contiguous() for index in range(len(strides))]

    def ours() -> Tensor:
        return torch.autograd.grad(scene.pool(moving), moving, upstream)[0]

    def check() -> None:
        half, step = 0.02, torch.randn(boxes.shape, generator=torch.Generator().manual_seed(1)).to(boxes.device)
        ends = [(scene.pool(boxes + sign * half * step) * upstream).double().sum() for sign in (1, -1)]
        change = float(ends[0] - ends[1]) / (2 * half)
        ensure(abs(float((ours() * step).double().sum()) - change) <= 0.02 * abs(change))

    name, peer = f"pool forward + box gradient, {scene.name}", "roi_align backward, to features"
    return Work(name, peer, 0.25, ours, partial(torch.autograd.grad, aligned, levels, parts, retain_graph=True), check)


def table(scene: Scene) -> Work:
    def check() -> None:
        finest = scene.maps.levels[0][0].flatten(1).t()
        ensure(torch.equal(scene.table.cells[: len(finest)], finest))

    ours = partial(FeatureTable.from_maps, scene.maps)
    return Work("table prepared, once an image", "roi_align of 1000 boxes", 0.15, ours, scene.align, check)


def view(scene: Scene) -> Work:
    last = scene.maps.levels[0].contiguous(memory_format=torch.channels_last)
    ours = partial(FeatureTable.from_maps, FeatureMaps((last,), scene.maps.strides, scene.maps.image_sizes))
    name = "table prepared, one level in channels-last memory: a view"
    peer = f"roi_align of {len(scene.boxes)} boxes"
    return Work(name, peer, 0.01, ours, scene.align, lambda: ensure(ours().cells.data_ptr() == last.data_ptr()))


def encoding(device: torch.device) -> Iterator[Work]:
    """Narrowing to the head's width and laying out, in one go."""
    scene = Scene(random_maps(256, STRIDES, device), coco_boxes(1000).to(device))
    head = IoUHead((256,) * 4, STRIDES).to(device).eval()
    encode = torch.no_grad()(partial(head.encode, scene.maps))

    def check() -> None:
        rows = scene.maps.levels[0][0].flatten(1).t()[:1000]
        weight, bias = head.narrow[0].weight.flatten(1), head.narrow[0].bias
        torch.testing.assert_close(encode().cells[:1000], rows @ weight.t() + bias, rtol=1e-4, atol=1e-5)

    yield Work("encode, once an image", "roi_align of 1000 boxes", 0.15, encode, scene.align, check)
