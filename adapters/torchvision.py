"""torchvision's detectors: Faster, Mask and Keypoint R-CNN; RetinaNet, FCOS, SSD and SSDlite.

The detector itself is never touched. A call runs a shallow twin of it, which shares every weight and hook and differs
in one method, ``postprocess_detections``: where the detector would suppress its boxes, the twin calls the suppression
it was given. What follows in the detector (mask and keypoint heads, the way back to the image) then works on the
detections that this returned.

The candidates are what the detector's own ``postprocess_detections`` returns when it is told to suppress nothing: above
its score threshold, among its best of each level or class where it counts them, clipped to the image; by falling score.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps, ImageTransform
from iou_refiner.adapters import torchvision_weights
from iou_refiner.adapters.twins import shallow
from iou_refiner.checks import require
from iou_refiner.detector.adapter import Adapter, AddedLosses, Suppression


class TorchvisionAdapter(Adapter):
    """A detector of ``torchvision.models.detection``.

    Args:
        detector: the live detector.
        longest_side: if given, :meth:`prepare` scales images to it (with antialiasing) before the call, for detectors
            trained on images made so.

    Raises:
        TypeError: it is none of torchvision's detectors.
    """

    def __init__(self, detector: nn.Module, *, longest_side: int | None = None):
        if not hasattr(detector, "transform") or not hasattr(_suppressor(detector), "postprocess_detections"):
            raise TypeError(
                "`detector` must be one of torchvision's: Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS, SSD; got "
                f"{type(detector).__name__}."
            )
        self.detector = detector
        self.longest_side = longest_side

    @classmethod
    def from_name(cls, name: str) -> TorchvisionAdapter:
        """The detector that ``torchvision:`` names: ``NAME`` in torchvision's model registry with its best published
        weights, or ``NAME:WEIGHTS.pth`` with weights of one's own, for as many classes as they are for.

        Raises:
            DataError: weights cannot be fetched, hold more than tensors, or are of another detector.
        """
        name, _, path = name.partition(":")
        detector = torchvision_weights.from_file(name, path) if path else torchvision_weights.published(name)
        return cls(detector.eval())

    @property
    def nms_threshold(self) -> float:
        """The detector's own."""
        return float(_suppressor(self.detector).nms_thresh)

    def settings(self) -> str:
        """How images are prepared and which boxes are candidates."""
        transform, own = self.detector.transform, _suppressor(self.detector)
        best = f" topk_candidates={own.topk_candidates}" if hasattr(own, "topk_candidates") else ""
        return (
            f"longest_side={self.longest_side} min_size={transform.min_size} max_size={transform.max_size} "
            f"mean={transform.image_mean} std={transform.image_std} score_thresh={own.score_thresh}{best}"
        )

    def prepare(self, rgb: np.ndarray) -> tuple[Tensor, ImageTransform]:
        """An RGB image (H, W, 3) uint8 as (3, h, w) float in [0, 1], scaled to ``longest_side``, and the transform."""
        height, width = rgb.shape[:2]
        if self.longest_side and max(height, width) != self.longest_side:
            scale = self.longest_side / max(height, width)
            size = max(1, round(height * scale)), max(1, round(width * scale))
            image = require("PIL.Image", extra="torchvision", purpose="Resizing images")
            rgb = np.asarray(image.fromarray(rgb).resize(size[::-1], image.Resampling.BILINEAR))
        tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 255
        return tensor.to(self.device), ImageTransform.resize((height, width), rgb.shape[:2])

    def twin(self, suppression: Suppression) -> Any:
        """A detector of the same class that shares every weight, with ``suppression`` in place of its own.

        Its results have ``ious`` (N,) where the suppression gives them. It follows the detector: load other weights
        into one and both have them.
        """
        return (_rcnn_twin if hasattr(self.detector, "roi_heads") else _dense_twin)(self.detector, suppression)

    def losses(self, added: AddedLosses, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The detector's own training call, with images and targets as it takes them, and the losses of ``added``."""
        from iou_refiner.adapters import torchvision_losses as training  # it builds on this module

        twin = training.rcnn_training_twin if hasattr(self.detector, "roi_heads") else training.dense_training_twin
        losses: dict[str, Tensor] = twin(self.detector, added)(*args, **kwargs)
        return losses

    def transforms(self, images: Sequence[Tensor], features: FeatureMaps) -> list[ImageTransform]:
        """From each image to the network input, for which torchvision resizes it."""
        return [
            ImageTransform.resize((int(image.shape[-2]), int(image.shape[-1])), size)
            for image, size in zip(images, features.image_sizes, strict=True)
        ]


def _rcnn_twin(detector: Any, suppression: Suppression) -> Any:
    """The twin of a two-stage detector; the feature maps are the levels its box head reads."""
    heads = detector.roi_heads

    def forward(maps: dict[str, Tensor], proposals: Any, image_sizes: Any, targets: Any = None) -> Any:
        detections: list[Detections] = []

        def suppress(*outputs: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            levels = [maps[name] for name in heads.box_roi_pool.featmap_names if name in maps]
            columns = _unsuppressed(heads).postprocess_detections(*outputs)
            candidates = [Detections(*rows) for rows in zip(*columns, strict=True)]
            detections.extend(suppression(_feature_maps(detector, levels, image_sizes), candidates))
            return [d.boxes for d in detections], [d.scores for d in detections], [d.labels for d in detections]

        call = shallow(heads, postprocess_detections=suppress)
        results, losses = call.forward(maps, proposals, image_sizes, targets)
        for result, image in zip(results, detections, strict=True):
            result.update(image.to_dict())
        return results, losses

    return shallow(detector, roi_heads=shallow(heads, forward=forward))


def _dense_twin(detector: Any, suppression: Suppression) -> Any:
    """The twin of a one-stage detector; the feature maps are all that its head reads."""

    def forward(images: Any, targets: Any = None) -> Any:
        levels: list[Tensor] = []

        def record(maps: list[Tensor]) -> Any:
            levels.extend(maps)
            return detector.head.forward(maps)

        def suppress(outputs: Any, anchors: Any, image_sizes: Any) -> list[dict[str, Tensor]]:
            results = _unsuppressed(detector).postprocess_detections(outputs, anchors, image_sizes)
            candidates = [Detections(**columns) for columns in results]
            detections = suppression(_feature_maps(detector, levels, image_sizes), candidates)
            return [image.to_dict() for image in detections]

        head = shallow(detector.head, forward=record)
        return shallow(detector, head=head, postprocess_detections=suppress).forward(images, targets)

    return shallow(detector, forward=forward)


def _suppressor(detector: Any) -> Any:
    """The module with the method ``postprocess_detections`` and its thresholds."""
    return getattr(detector, "roi_heads", detector)


def _unsuppressed(suppressor: Any) -> Any:
    """The same module, but it suppresses nothing: no overlap is too large, no number of detections too high."""
    return shallow(suppressor, nms_thresh=math.inf, detections_per_img=sys.maxsize)


def _feature_maps(detector: Any, levels: list[Tensor], image_sizes: Sequence[tuple[int, int]]) -> FeatureMaps:
    """The levels with their strides, told by the longer side: it has more cells, so whole cells fit it better."""
    side, axis = max((size[axis], axis) for size in image_sizes for axis in (0, 1))
    cells = [level.shape[2 + axis] for level in levels]
    default_boxes: Any = getattr(detector, "anchor_generator", None)
    if hasattr(default_boxes, "steps"):  # SSD, whose maps are of any size: its cells are where its default boxes are
        strides = default_boxes.steps or [side / count for count in cells]
    else:
        strides = _pyramid_strides(side, detector.transform.size_divisible, cells)
    return FeatureMaps(tuple(levels), tuple(strides), tuple(image_sizes))


def _pyramid_strides(side: int, divisor: int, cells: list[int]) -> list[float]:
    """Powers of two, whatever the image. A level is compared with the one before it: 3 cells then 2 is a halving, which
    the padded side, two or three cells long, would not tell."""
    padded = math.ceil(side / divisor) * divisor
    halvings = (round(math.log2(before / after)) for before, after in pairwise([padded, *cells]))
    return [2.0**exponent for exponent in accumulate(halvings)]
