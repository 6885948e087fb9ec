"""Training of Detectron2's detectors together with a head: their own training call, with losses added to its dict.

The detector computes its losses first, untouched. Detectron2's trainers take whatever is called with a batch and
returns a dict of losses, so they take what wraps such a detector as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iou_refiner import FeatureMaps
from iou_refiner.adapters.twins import shallow
from iou_refiner.detector.adapter import MOST_PROPOSALS, AddedLosses, TrainingImage


def training_twin(detector: Any, added: AddedLosses) -> Any:
    """The twin of an R-CNN, whose proposals are those of its proposal generator, or of a RetinaNet or FCOS."""
    shapes = detector.backbone.output_shape()
    if not hasattr(detector, "roi_heads"):
        return _dense_twin(detector, added, [shapes[name].stride for name in detector.head_in_features])
    heads = detector.roi_heads
    strides = tuple(shapes[name].stride for name in heads.in_features)

    def forward(images: Any, features: dict[str, Tensor], proposals: list[Any], targets: Any = None) -> Any:
        proposed = [instances.proposal_boxes.tensor for instances in proposals]
        sampled, losses = heads.forward(images, features, proposals, targets)
        maps = FeatureMaps(tuple(features[name] for name in heads.in_features), strides, tuple(images.image_sizes))
        return sampled, {**added(maps, _images(proposed, targets)), **losses}

    twin = shallow(detector)
    twin._modules["roi_heads"] = shallow(heads, forward=forward)
    return twin


def _dense_twin(detector: Any, added: AddedLosses, strides: Sequence[float]) -> Any:
    """It proposes the boxes that it is surest of, whatever their scores."""
    from iou_refiner.adapters.detectron2.adapter import _unsuppressed

    twin, unsure = shallow(detector), _unsuppressed(detector)
    vars(unsure).update(test_score_thresh=0.0, test_topk_candidates=MOST_PROPOSALS)

    def forward_training(images: Any, features: list[Tensor], predictions: Any, gt_instances: list[Any]) -> Any:
        losses = detector.forward_training(images, features, predictions, gt_instances)
        with torch.no_grad():  # FCOS decodes its predictions in place
            copies = [[level.detach().clone() for level in prediction] for prediction in predictions]
            decoded = unsure.forward_inference(images, [level.detach() for level in features], copies)
        maps = FeatureMaps(tuple(features), tuple(strides), tuple(images.image_sizes))
        proposed = [instances.pred_boxes.tensor for instances in decoded]
        return {**added(maps, _images(proposed, gt_instances)), **losses}

    twin.forward_training = forward_training
    return twin


def _images(proposals: Sequence[Tensor], targets: Sequence[Any]) -> list[TrainingImage]:
    return [
        TrainingImage.of(boxes, (instances.gt_boxes.tensor, instances.gt_classes))
        for boxes, instances in zip(proposals, targets, strict=True)
    ]
