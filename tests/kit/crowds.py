"""Candidates around objects as a detector without suppression has them, and networks over siblings with opinions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner.boxes import clip_boxes
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.siblings.clusters import Clusters
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.sibling_net import SiblingNet
from iou_refiner.stage.nms import nms
from iou_refiner.structures import Detections
from iou_refiner.training.samples import Targets
from tests.kit.scenes import make_results, make_truth

WIDTH, HEIGHT = 640, 480
LIMIT = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
#: Bounds so low that a crowd exceeds them.
SMALL = SiblingConfig(siblings=5, rivals=3, width=16, pair_width=8, layers=2, attention_heads=2)


def make_targets(seed: int, *, objects: int = 4, labels: int = 2) -> Targets:
    """Objects of a few classes, none of them a crowd."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(objects, 2, generator=generator) * torch.tensor([400.0, 300.0])
    size = 40 + torch.rand(objects, 2, generator=generator) * 120
    gt_labels = torch.randint(labels, (objects,), generator=generator)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    return Targets(torch.cat([corner, corner + size], 1), gt_labels, *none)


def make_crowd(seed: int, *, objects: int = 4, around: int = 9, labels: int = 2) -> tuple[Detections, Targets]:
    """Candidates scattered around each of some objects, with scores that all differ, and the objects."""
    targets = make_targets(seed, objects=objects, labels=labels)
    generator = torch.Generator().manual_seed(seed + 1)
    gt_boxes = targets.gt_boxes.repeat_interleave(around, 0)
    size = (gt_boxes[:, 2:] - gt_boxes[:, :2]).repeat(1, 2)
    boxes = gt_boxes + 0.12 * size * torch.randn(gt_boxes.shape, generator=generator)
    boxes = clip_boxes(torch.cat([boxes.view(-1, 2, 2).amin(1), boxes.view(-1, 2, 2).amax(1)], 1), (HEIGHT, WIDTH))
    scores = 0.02 + 0.9 * torch.rand(len(boxes), generator=generator)
    order = torch.randperm(len(boxes), generator=generator)
    return Detections(boxes, scores, targets.gt_labels.repeat_interleave(around))[order], targets


def clusters_of(candidates: Detections, config: SiblingConfig = SMALL) -> Clusters:
    """The clusters around the survivors of the network's own suppression."""
    boxes, scores, labels = candidates.boxes, candidates.scores, candidates.labels
    keep = nms(boxes, scores, labels, threshold=config.nms_threshold)
    return Clusters.of(boxes, scores, labels, keep, config)


def opinionated(net: nn.Module, seed: int = 0) -> Any:
    """The same network with weights so large that every input shows in every output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net.eval()


def make_net(embedding: int = 0, config: SiblingConfig = SMALL) -> SiblingNet:
    net: SiblingNet = opinionated(SiblingNet(config, embedding=embedding))
    return net


def limits_of(candidates: Detections) -> Tensor:
    """The limits (N, 4) of the candidates of one image."""
    return LIMIT.expand(len(candidates), 4)


def make_saved(images: int, seed: int = 0) -> tuple[Results, GroundTruth]:
    """Candidates whose siblings tell the truth and whose class scores tell nothing, and the annotation.

    Around an object lie eight boxes, about where there is nothing two; the best of their scores is as high here as
    there.
    """
    rng = np.random.default_rng(seed)
    records, annotations = [], []
    for image in range(1, images + 1):
        cells = iter(rng.permutation([(x, y) for x in range(4) for y in range(3)]))
        for around in (8, 8, 8, 2, 2, 2, 2):
            x, y = next(cells) * 160 + rng.uniform(5, 20, 2)
            size = rng.uniform(50, 120, 2)
            if around == 8:
                annotations.append((image, 1, (x, y, *size), False))
            best, rest = rng.uniform(0.2, 0.95), rng.uniform(0.2, 1, around - 1)
            for score in (best, *(best * rest)):
                shift = rng.uniform(0.001, 0.15) * rng.standard_normal(4)
                box = np.maximum([x + shift[0] * size[0], y + shift[1] * size[1]], 0)
                records.append((image, 1, (*box, *(size * np.exp(shift[2:]))), score))
    return make_results(records), make_truth(range(1, images + 1), [1], annotations)
