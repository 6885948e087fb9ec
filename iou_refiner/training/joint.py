"""Losses of the head on what a detector sees in training: both are trained together, by whatever loop trains it.

The head learns from jittered ground truth and from the detector's own proposals, whose positions it does not move: the
gradient goes into the features, not into the boxes. So the features learn to show where an object ends, which those of
a frozen detector need not do (the paper's section on joint training).

Nothing is drawn from torch's own generators: what the detector draws after this is what it would have drawn without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iou_refiner.boxes import pairwise_iou, valid_boxes
from iou_refiner.checks import check_number
from iou_refiner.detector.adapter import Adapter, AddedLosses, TrainingImage
from iou_refiner.detector.features import Extraction
from iou_refiner.head.checkpoint import Head
from iou_refiner.head.config import HeadConfig, HeadMetadata, TrainedCategory
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.structures import Detections, FeatureMaps, ImageTransform
from iou_refiner.training.loop import mean_squares, scale_input_layer
from iou_refiner.training.losses import losses_by_output
from iou_refiner.training.samples import Samples, Targets, collate, sample_boxes
from iou_refiner.training.settings import TrainSettings

_MOST_WEIGHT = 1e6


def added_losses(head: Head, weight: float = 1.0, settings: TrainSettings | None = None) -> AddedLosses:
    """The losses of a head as a function of what the detector sees: ``loss_iou``, and ``loss_iou_ranking`` and
    ``loss_iou_deltas`` where the head has them.

    Args:
        head: reads features; it is trained as it is by itself, from boxes drawn in the same way.
        weight: of all of them. At 0 the detector learns what it would without.
        settings: how boxes are drawn: ``boxes_per_image``, ``candidate_share``, ``jitter_min_iou``.

    Raises:
        TypeError: the head reads no features.
        ValueError: the weight is out of range, or the head has a network over siblings.
    """
    check_number("loss_weight", weight, 0, _MOST_WEIGHT)
    if not isinstance(head, IoUHead):
        raise TypeError(
            f"A {type(head).__name__} reads no features of the detector, so there is nothing to train together: train "
            "it by itself. To train the detector alone, put the head in inference mode: refiner.head.eval()."
        )
    if head.siblings is not None:
        raise ValueError(
            "The head has a network over siblings, which is trained once the rest of the head is. Set "
            "head.siblings = None to train detector and head together, or refiner.head.eval() to train the detector "
            "alone."
        )
    reads, settings = head, settings or TrainSettings()

    def losses(features: FeatureMaps, images: list[TrainingImage]) -> dict[str, Tensor]:
        generator = _generator(images)
        samples = [_sample(features, n, image, settings, generator) for n, image in enumerate(images)]
        # Of a small network, in float32 whatever the detector is trained in: boxes are no matter for half precision.
        with torch.autocast(features.device.type, enabled=False):
            return {name: weight * value for name, value in _losses(reads, features, samples).items()}

    return losses


def _losses(head: IoUHead, features: FeatureMaps, samples: Sequence[Samples]) -> dict[str, Tensor]:
    batch, image_index = collate(samples)
    batch, image_index = batch.to(head.device), image_index.to(head.device)
    embedding = head.roi_embedding(head.encode(features), batch.boxes, image_index)
    return {
        "loss_iou" if name == "iou" else f"loss_iou_{name}": value
        for name, value in losses_by_output(head, embedding, batch, image_index).items()
    }


def _sample(
    features: FeatureMaps, number: int, image: TrainingImage, settings: TrainSettings, generator: torch.Generator
) -> Samples:
    """Boxes of one image with their truth, on the CPU. A proposal is of the class of the object that it fits best."""
    columns = (image.gt_boxes, image.gt_labels, image.ignored_boxes, image.ignored_labels)
    gt_boxes, gt_labels, ignored_boxes, ignored_labels = (column.cpu() for column in columns)
    valid, proposals = valid_boxes(gt_boxes), image.proposals.cpu()
    targets = Targets(gt_boxes[valid], gt_labels[valid], ignored_boxes, ignored_labels)
    if len(targets.gt_boxes):
        labels = targets.gt_labels[pairwise_iou(proposals, targets.gt_boxes).argmax(1)]
    else:  # nothing says what they are, and none of them has an IoU to learn
        labels = torch.zeros(len(proposals), dtype=torch.int64)
    candidates = Detections(proposals, torch.zeros(len(proposals)), labels)
    size = features.image_sizes[number]
    of_image = FeatureMaps(tuple(level[number : number + 1] for level in features.levels), features.strides, (size,))
    return sample_boxes(
        Extraction(number, of_image, candidates, ImageTransform(size)), targets, settings.boxes_per_image,
        candidate_share=settings.candidate_share, jitter_min_iou=settings.jitter_min_iou, generator=generator,
    )  # fmt: skip


def _generator(images: Sequence[TrainingImage]) -> torch.Generator:
    """Seeded by the state of torch's own generator, which stays as it is, and by what is annotated: where the
    detector's own sampling goes on to the same bytes, so does this one."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=7)
    for image in images:
        digest.update(np.ascontiguousarray(image.gt_boxes.cpu().numpy()).tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little"))


def new_head(
    adapter: Adapter,
    images: Sequence[Any],
    config: HeadConfig | None = None,
    *,
    num_classes: int = 0,
    categories: Sequence[TrainedCategory] = (),
) -> IoUHead:
    """An untrained head for a detector's features, its first layer scaled to their size.

    Args:
        adapter: the detector, in inference mode.
        images: a few, as :meth:`Adapter.prepare` returns them; the detector runs on each.
        config: architecture of the head.
        num_classes: 0 for a class-agnostic head; else the detector's labels are 0 to ``num_classes - 1``.
        categories: what it will be trained on; empty for all that the detector detects.

    Raises:
        ValueError: no images, or the architecture does not suit the features.
    """
    if not len(images):
        raise ValueError("`images` must hold at least one image: the detector's features show what a head needs.")
    features = [adapter.extract([image])[0] for image in images]
    metadata = HeadMetadata(detector_name=adapter.name, categories=tuple(categories))
    head = IoUHead(
        features[0].channels, features[0].strides, config, num_classes=num_classes, metadata=metadata
    )  # fmt: skip
    scale_input_layer(head, torch.stack([mean_squares(maps) for maps in features]).nanmean(0))
    return head.to(adapter.device)


def belonging_to(head: Head, adapter: Adapter) -> HeadMetadata:
    """What a head says about itself once it was trained together with this detector, as that is now."""
    trained: Mapping[str, Any] = {**head.metadata.training, "joint": True}
    return replace(head.metadata, detector_name=adapter.name, fingerprint=adapter.fingerprint(), training=trained)
