"""Training of torchvision's detectors together with a head: their own training call, with losses added to its dict.

A call runs a shallow twin, as in inference. The detector computes its losses first, untouched; then what it was given
and what it proposed goes to the losses that are added. Nothing random is drawn in between, so the detector's own losses
are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from iou_refiner.adapters.torchvision import _feature_maps, _unsuppressed
from iou_refiner.adapters.twins import shallow
from iou_refiner.detector.adapter import MOST_PROPOSALS, AddedLosses, TrainingImage


def rcnn_training_twin(detector: Any, added: AddedLosses) -> Any:
    """The twin of a two-stage detector; its proposals are those of its RPN."""
    heads = detector.roi_heads

    def forward(maps: dict[str, Tensor], proposals: list[Tensor], image_sizes: Any, targets: Any = None) -> Any:
        proposed = list(proposals)
        results, losses = heads.forward(maps, proposals, image_sizes, targets)
        if heads.training:
            levels = [maps[name] for name in heads.box_roi_pool.featmap_names if name in maps]
            features = _feature_maps(detector, levels, image_sizes)
            losses = {**added(features, _images(proposed, targets)), **losses}
        return results, losses

    return shallow(detector, roi_heads=shallow(heads, forward=forward))


def dense_training_twin(detector: Any, added: AddedLosses) -> Any:
    """The twin of a one-stage detector; it proposes the boxes that it is surest of, whatever their scores."""

    def forward(images: Any, targets: Any = None) -> Any:
        levels: list[Tensor] = []
        sizes: list[tuple[int, int]] = []

        def record(maps: list[Tensor]) -> Any:
            levels.extend(maps)
            return detector.head.forward(maps)

        def prepare(images: Any, targets: Any = None) -> Any:
            prepared = detector.transform.forward(images, targets)
            sizes.extend(prepared[0].image_sizes)
            return prepared

        def compute_loss(targets: Any, outputs: dict[str, Tensor], anchors: list[Tensor], *rest: Any) -> Any:
            losses = detector.compute_loss(targets, outputs, anchors, *rest)
            images = _images(_proposals(detector, levels, outputs, anchors, sizes), targets)
            return {**added(_feature_maps(detector, levels, sizes), images), **losses}

        parts = {"head": shallow(detector.head, forward=record), "transform": shallow(detector.transform)}
        parts["transform"].forward = prepare
        return shallow(detector, compute_loss=compute_loss, **parts).forward(images, targets)

    return shallow(detector, forward=forward)


@torch.no_grad()
def _proposals(
    detector: Any,
    levels: list[Tensor],
    outputs: dict[str, Tensor],
    anchors: list[Tensor],
    sizes: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """The boxes of each image that the detector is surest of, (P, 4): decoded as it does for its detections."""
    outputs = {name: output.detach() for name, output in outputs.items()}
    most, by_level, boxes = MOST_PROPOSALS, cast(Any, outputs), cast(Any, anchors)
    if hasattr(detector.anchor_generator, "steps"):  # SSD counts its best boxes class by class, over all levels
        most = max(1, len(levels) * MOST_PROPOSALS // outputs["cls_logits"].shape[-1])
    else:
        cells = [level.shape[2] * level.shape[3] for level in levels]
        of_cell = outputs["cls_logits"].shape[1] // sum(cells)
        rows = [count * of_cell for count in cells]
        by_level = {name: list(output.split(rows, 1)) for name, output in outputs.items()}
        boxes = [list(image.split(rows)) for image in anchors]
    unsure = shallow(_unsuppressed(detector), score_thresh=0.0, topk_candidates=most)
    return [image["boxes"] for image in unsure.postprocess_detections(by_level, boxes, sizes)]


def _images(proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> list[TrainingImage]:
    return [
        TrainingImage.of(boxes, (target["boxes"], target["labels"]))
        for boxes, target in zip(proposals, targets, strict=True)
    ]
