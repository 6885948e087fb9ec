"""What the rows are made of: two functions to race, and the boxes and maps they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iou_refiner import FeatureMaps, IoUHead

HEIGHT, WIDTH, BINS = 800, 1066, 7
STRIDES = (4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Work:
    """Two functions to race."""

    name: str
    peer: str
    limit: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    check: Callable[[], None]


def coco_boxes(count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Boxes of 20 to 490 px, 70 % of them around 15 objects."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator)
    side, aspect = torch.exp(draw(count) * 3.2 + 3) * min(1, height / HEIGHT), torch.exp((draw(count) - 0.5) * 0.7)
    size = torch.stack([(side * aspect).clamp(max=width - 2), (side / aspect).clamp(max=height - 2)], 1)
    corner = draw(count, 2) * (torch.tensor([width, height]) - size)
    boxes = torch.cat([corner, corner + size], 1)
    near = int(count * 0.7)
    objects = torch.randint(0, min(15, count), (near,), generator=generator)
    boxes[count - near :] = boxes[objects] + size[objects].repeat(1, 2) * (draw(near, 4) - 0.5) * 0.2
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def clusters(count: int, classes: int = 80) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, 20 around each object, their scores and ranking without ties, and their classes."""
    generator = torch.Generator().manual_seed(0)
    objects = coco_boxes(max(count // 20, 5))
    label = torch.randint(0, classes, (len(objects),), generator=generator)
    own = torch.randint(0, len(objects), (count,), generator=generator)
    size = (objects[:, 2:] - objects[:, :2])[own]
    boxes = objects[own] + size.repeat(1, 2) * torch.randn(count, 4, generator=generator) * 0.1
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], 1)
    scores, ranking = ((torch.randperm(count, generator=generator) + 1) / (count + 1) for _ in range(2))
    return boxes, scores, ranking, label[own]


def random_maps(channels: int, strides: tuple[float, ...], device: torch.device) -> FeatureMaps:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, channels, -(-HEIGHT // int(s)), -(-WIDTH // int(s))) for s in strides]
    return FeatureMaps(
        tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes), strides, ((HEIGHT, WIDTH),)
    )


def ensure(truth: bool) -> None:
    assert truth, "a contender's result is wrong"


def lively(head: IoUHead) -> IoUHead:
    """With steeper outputs: the prediction of an untrained head changes so little that boxes converge at once."""
    with torch.no_grad():
        for output in (head.iou_output, head.ranking_output):
            output.weight *= 30
    return head.eval()
