"""What joint training needs beside a case of the adapter contract: annotated images, and the detector's own losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.adapters import cases_detectron2, cases_mmdet, cases_torchvision
from tests.adapters.case import Case
from tests.adapters.cases_mmdet import MmdetCase

#: Corners as fractions of width and height, and the label, of the objects of each image in turn.
OBJECTS = [((0.1, 0.2, 0.6, 0.7), 1), ((0.4, 0.1, 0.9, 0.5), 2), ((0.2, 0.3, 0.8, 0.95), 1)]


def annotated(number: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes (G, 4) and labels (G,) of image ``number``: two of the first image, one of the second."""
    chosen = OBJECTS[: 2 - number]
    scale = torch.tensor([width, height, width, height])
    boxes = torch.tensor([corners for corners, _ in chosen]).reshape(-1, 4) * scale
    return boxes, torch.tensor([label for _, label in chosen], dtype=torch.int64)


class JointCase:
    """torchvision's detectors: images and targets in, losses by name out. Other frameworks override what differs."""

    def __init__(self, build: Callable[[], Case]):
        self.case = build()
        self.adapter = self.case.adapter
        self.batch = self.make_batch()
        self.start = copy.deepcopy(self.adapter.detector.state_dict())

    def restart(self) -> None:
        """Weights and buffers as they were at the start, and what a detector keeps beside them: Detectron2's dense ones
        divide by a running mean."""
        self.adapter.detector.load_state_dict(self.start)
        vars(self.adapter.detector).pop("_loss_normalizer", None)
        vars(self.adapter.detector).pop("loss_normalizer", None)

    def make_batch(self) -> tuple[Any, ...]:
        """What the framework's training is called with: two images with objects."""
        targets = []
        for number, image in enumerate(self.case.images[:2]):
            height, width = image.shape[-2:]
            boxes, labels = annotated(number, height, width)
            points = torch.cat([boxes[:, :2] + 3, torch.ones(len(boxes), 1)], 1)
            masks = torch.ones(len(boxes), height, width, dtype=torch.uint8)
            keypoints = points[:, None].repeat(1, 3, 1)
            targets.append({"boxes": boxes, "labels": labels, "keypoints": keypoints, "masks": masks})
        return self.case.images[:2], targets

    def training(self) -> Any:
        """The context that the framework's training needs."""
        return nullcontext()

    def own_losses(self) -> dict[str, Any]:
        """The detector's own losses, without any of our code."""
        losses: dict[str, Any] = self.adapter.detector(*self.batch)
        return losses


class Detectron2JointCase(JointCase):
    """Detectron2: dicts with ``instances``, in the pixels of the image that goes in."""

    def make_batch(self) -> tuple[Any, ...]:
        from detectron2.structures import BitMasks, Boxes, Instances, Keypoints

        batch = []
        for number, image in enumerate(self.case.images[:2]):
            height, width = image["image"].shape[-2:]
            boxes, labels = annotated(number, height, width)
            points = torch.cat([boxes[:, :2] + 3, torch.full((len(boxes), 1), 2.0)], 1)
            instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=labels)
            instances.gt_masks = BitMasks(torch.ones(len(boxes), height, width, dtype=torch.bool))
            instances.gt_keypoints = Keypoints(points[:, None].repeat(1, 3, 1))
            batch.append({**image, "instances": instances})
        return (batch,)

    @contextmanager
    def training(self) -> Iterator[None]:
        from detectron2.utils.events import EventStorage

        with EventStorage(), cases_detectron2.detectron2_warns():
            yield


class MmdetJointCase(JointCase):
    """mmdet: what its pipeline makes of an image, with ``gt_instances`` in its data sample."""

    def make_batch(self) -> tuple[Any, ...]:
        import numpy as np
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        batch = []
        for number, item in enumerate(self.case.images[:2]):
            item = {"inputs": item["inputs"], "data_samples": item["data_samples"].clone()}
            height, width = item["data_samples"].img_shape[:2]
            boxes, labels = annotated(number, height, width)
            masks = BitmapMasks(np.ones((len(boxes), height, width), np.uint8), height, width)
            item["data_samples"].gt_instances = InstanceData(bboxes=boxes, labels=labels, masks=masks)
            item["data_samples"].ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
            batch.append(item)
        return (batch,)

    def own_losses(self) -> dict[str, Any]:
        from mmengine.dataset import pseudo_collate

        detector = self.adapter.detector
        losses: dict[str, Any] = detector(**detector.data_preprocessor(pseudo_collate(*self.batch), True), mode="loss")
        return losses


def mmdet_joint(name: str) -> Callable[[], JointCase]:
    return lambda: MmdetJointCase(lambda: MmdetCase(name))


CASES: dict[str, Callable[[], JointCase]] = {
    **{
        f"torchvision: {name}": lambda build=build: JointCase(build)
        for name, build in cases_torchvision.CASES.items()
        if name in cases_torchvision.BUILDERS
    },
    **{
        f"detectron2: {name}": lambda build=build: Detectron2JointCase(build)
        for name, build in cases_detectron2.CASES.items()
    },
    **{f"mmdet: {name}": mmdet_joint(name) for name in ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")},
}
WARNINGS = (*cases_mmdet.WARNINGS, "ignore:.*meshgrid:UserWarning", "ignore:.*torch.jit.script:FutureWarning")
