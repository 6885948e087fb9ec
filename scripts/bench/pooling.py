"""The rows of bench.py about pooling: against torchvision's roi_align, from a table prepared once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from iou_refiner import FeatureMaps, FeaturePyramid, IoUPredictor, prroi_pool
from iou_refiner.pooling.functional import assign_levels
from scripts.bench.work import BINS, STRIDES, Work, coco_boxes, ensure, random_maps
from tests.kit.reference import prroi_pool_reference


def align(levels: tuple[Tensor, ...], strides: tuple[float, ...], boxes: Tensor, level: Tensor) -> list[Tensor]:
    return [
        roi_align(feature, [boxes[level == index]], BINS, 1 / stride, 2, True)
        for index, (feature, stride) in enumerate(zip(levels, strides, strict=True))
    ]


def check_pooling(maps: FeatureMaps, boxes: Tensor, level: Tensor, pooled: Tensor) -> None:
    for row in range(0, len(boxes), len(boxes) // 3):
        feature = maps.levels[int(level[row])][0, :2].double().cpu().numpy()
        cells = boxes[row].double().cpu().numpy() / maps.strides[int(level[row])] - 0.5
        error = np.abs(pooled[row, :2].detach().cpu().numpy() - prroi_pool_reference(feature, cells, BINS)).max()
        assert error <= 2e-6 * np.ptp(feature), error


def pooling(
    channels: int, strides: tuple[float, ...], count: int, limit: float, device: torch.device
) -> Iterator[Work]:
    maps, boxes = random_maps(channels, strides, device), coco_boxes(count).to(device)
    level, pyramid = assign_levels(boxes, strides), FeaturePyramid.from_maps(maps)
    pool = partial(prroi_pool, pyramid, boxes, level=level)
    peer = partial(align, maps.levels, strides, boxes, level)
    name = f"{'FPN' if len(strides) > 1 else 'stride 16'}, C {channels}, {count} boxes"
    yield Work(
        f"pool forward, {name}", "roi_align, 2 samples", limit,
        pool, peer, lambda: check_pooling(maps, boxes, level, pool()),
    )  # fmt: skip
    if channels == 256:
        leaves = tuple(feature.clone().requires_grad_() for feature in maps.levels)
        aligned, moving = align(leaves, strides, boxes, level), boxes.clone().requires_grad_()
        upstream = torch.randn(count, channels, BINS, BINS, device=device).to(memory_format=torch.channels_last)
        parts = [upstream[level == index].contiguous() for index in range(len(strides))]

        def both() -> Tensor:
            return torch.autograd.grad(prroi_pool(pyramid, moving, level=level), moving, upstream)[0]

        def check() -> None:
            half, step = 0.02, torch.randn(boxes.shape, generator=torch.Generator().manual_seed(1)).to(device)
            ends = [
                (prroi_pool(pyramid, boxes + s * half * step, level=level) * upstream).double().sum() for s in (1, -1)
            ]
            change = float(ends[0] - ends[1]) / (2 * half)
            assert abs(float((both() * step).double().sum()) - change) <= 0.02 * abs(change), change

        yield Work(
            f"pool forward + box gradient, {name}", "roi_align backward, to features", 0.25, both,
            lambda: torch.autograd.grad(aligned, leaves, parts, retain_graph=True), check,
        )  # fmt: skip
    if count == 1000:
        table = pyramid.table[: maps.levels[0][0, 0].numel()]
        same = torch.equal(table, maps.levels[0][0].flatten(1).t())
        yield Work(
            "table prepared, once an image", "roi_align of 1000 boxes", 0.15,
            partial(FeaturePyramid.from_maps, maps), peer, lambda: ensure(same),
        )  # fmt: skip
    if len(strides) == 1:
        last = maps.levels[0].contiguous(memory_format=torch.channels_last)
        given = FeatureMaps((last,), strides, maps.image_sizes)
        yield Work(
            "table prepared, one level in channels-last memory: a view", f"roi_align of {count} boxes", 0.01,
            partial(FeaturePyramid.from_maps, given), peer,
            lambda: ensure(FeaturePyramid.from_maps(given).table.data_ptr() == last.data_ptr()),
        )  # fmt: skip


def encoding(device: torch.device) -> Iterator[Work]:
    """Narrowing to the head's width and laying out, in one go."""
    maps, boxes = random_maps(256, STRIDES, device), coco_boxes(1000).to(device)
    level = assign_levels(boxes, STRIDES)
    head = IoUPredictor((256,) * 4, STRIDES).to(device).eval()

    def check() -> None:
        row = maps.levels[0][0].flatten(1).t()[:1000]
        weight, bias = head.narrow[0].weight.flatten(1), head.narrow[0].bias
        torch.testing.assert_close(encode().table[:1000], row @ weight.t() + bias, rtol=1e-4, atol=1e-5)

    encode = torch.no_grad()(partial(head.encode, maps))
    peer = partial(align, maps.levels, STRIDES, boxes, level)
    yield Work("encode, once an image", "roi_align of 1000 boxes", 0.15, encode, peer, check)
