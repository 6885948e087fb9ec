"""A small head, and features and boxes for it, shared by the tests of the head and of its file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iou_refiner.head.config import HeadConfig
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.structures import FeatureMaps

CHANNELS, STRIDES = (3, 5), (8.0, 16.0)


def make_head(num_classes: int = 0, **config: Any) -> IoUHead:
    """A small head whose IoU is not near one half everywhere, as that of a fresh one is."""
    head = IoUHead(
        CHANNELS, STRIDES, HeadConfig(**{"width": 4, "hidden": (16,), "output_size": 3, **config}),
        num_classes=num_classes,
    )  # fmt: skip
    nn.init.normal_(head.iou_output.weight)
    nn.init.normal_(head.iou_output.bias)
    return head


def make_features(images: int = 2) -> FeatureMaps:
    generator = torch.Generator().manual_seed(1)
    levels = [
        torch.randn(images, c, 512 // int(s), 512 // int(s), generator=generator)
        for c, s in zip(CHANNELS, STRIDES, strict=True)
    ]
    return FeatureMaps(tuple(levels), STRIDES, ((512, 512),) * images)


def make_boxes(count: int = 9) -> tuple[Tensor, Tensor]:
    """Boxes of both images, and the image of each."""
    corner = torch.rand(count, 2) * 200
    return torch.cat([corner, corner + 10 + torch.rand(count, 2) * 250], 1), torch.arange(count) % 2


def iou_logits(
    head: IoUHead,
    table: FeatureTable,
    boxes: Tensor,
    image_index: Tensor,
    labels: Tensor | None = None,
    level: Tensor | None = None,
) -> Tensor:
    """What ``head(...)`` makes the IoU from; differences show in it that the sigmoid would flatten."""
    return head.iou_logits(head.roi_embedding(table, boxes, image_index, level), labels)
