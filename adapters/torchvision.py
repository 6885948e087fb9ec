"""torchvision's detectors: Faster, Mask and Keypoint R-CNN; RetinaNet, FCOS, SSD and SSDlite.

The detector itself is never touched. A call runs a shallow twin of it, which shares every weight and hook and differs
in one method, ``postprocess_detections``: where the detector would suppress its boxes, the twin asks the stage. What
follows in the detector (mask and keypoint heads, the way back to the image) then works on the boxes the stage returned.

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

from iou_refiner import Detections, FeatureMaps, Frame, fingerprint
from iou_refiner.adapters.twins import seen_by_stage, shallow
from iou_refiner.checks import require
from iou_refiner.detector.adapter import Suppression


class TorchvisionAdapter:
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
        self.detector: Any = detector
        self.longest_side = longest_side
        self.category_ids: dict[int, int] | None = None  # torchvision's labels are the category ids it was trained on

    @classmethod
    def from_name(cls, name: str) -> TorchvisionAdapter:
        """The detector called ``name`` in torchvision's model registry, with its best published weights."""
        models = require("torchvision.models", extra="torchvision", purpose="A torchvision detector")
        return cls(models.get_model(name, weights="DEFAULT").eval())

    @property
    def device(self) -> torch.device:
        """Where the detector's weights are."""
        device: torch.device = next(self.detector.parameters()).device
        return device

    def to(self, device: torch.device | str) -> TorchvisionAdapter:
        """Move the detector."""
        self.detector.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash of all weights and buffers of the detector."""
        return fingerprint(self.detector)

    def settings(self) -> str:
        """How images are prepared and which boxes are candidates."""
        transform, own = self.detector.transform, _suppressor(self.detector)
        best = f" topk_candidates={own.topk_candidates}" if hasattr(own, "topk_candidates") else ""
        return (
            f"longest_side={self.longest_side} min_size={transform.min_size} max_size={transform.max_size} "
            f"mean={transform.image_mean} std={transform.image_std} score_thresh={own.score_thresh}{best}"
        )

    def prepare(self, rgb: np.ndarray) -> tuple[Tensor, Frame]:
        """An RGB image (H, W, 3) uint8 as the detector takes it, (3, H, W) float in [0, 1], and the frame between."""
        height, width = rgb.shape[:2]
        if self.longest_side and max(height, width) != self.longest_side:
            scale = self.longest_side / max(height, width)
            size = max(1, round(height * scale)), max(1, round(width * scale))
            image = require("PIL.Image", extra="torchvision", purpose="Resizing images")
            rgb = np.asarray(image.fromarray(rgb).resize(size[::-1], image.Resampling.BILINEAR))
        tensor = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 255
        return tensor.to(self.device), Frame.resize((height, width), rgb.shape[:2])

    def twin(self, stage: Suppression) -> Any:
        """A detector of the same class that shares every weight, with ``stage`` as its suppression.

        Its results have ``ious`` (N,) where the stage gives them. It follows the detector: load other weights into one
        and both have them.
        """
        return (_rcnn_twin if hasattr(self.detector, "roi_heads") else _dense_twin)(self.detector, stage)

    def run(self, stage: Suppression, images: Sequence[Tensor], targets: None = None) -> list[dict[str, Tensor]]:
        """The detector's own call with its suppression replaced by ``stage``; its own result, plus ``ious``."""
        with torch.no_grad():
            results: list[dict[str, Tensor]] = self.twin(stage)(images)
        return results

    def extract(self, images: Sequence[Tensor]) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """Feature maps, candidates before suppression (network frame), and the frame of each image."""
        features, candidates = seen_by_stage(self.run, images)
        frames = [
            Frame.resize((int(image.shape[-2]), int(image.shape[-1])), size)
            for image, size in zip(images, features.image_sizes, strict=True)
        ]
        return features, candidates, frames


def _rcnn_twin(detector: Any, stage: Suppression) -> Any:
    """The twin of a two-stage detector; the feature maps are the levels its box head reads."""
    heads = detector.roi_heads

    def forward(maps: dict[str, Tensor], proposals: Any, image_sizes: Any, targets: Any = None) -> Any:
        kept: list[Detections] = []

        def suppress(*outputs: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            levels = [maps[name] for name in heads.box_roi_pool.featmap_names if name in maps]
            columns = _lenient(heads).postprocess_detections(*outputs)
            candidates = [Detections(*rows) for rows in zip(*columns, strict=True)]
            kept.extend(stage(_feature_maps(detector, levels, image_sizes), candidates))
            return [d.boxes for d in kept], [d.scores for d in kept], [d.labels for d in kept]

        call = shallow(heads, postprocess_detections=suppress)
        results, losses = call.forward(maps, proposals, image_sizes, targets)
        for result, found in zip(results, kept, strict=True):
            result.update(_columns(found))
        return results, losses

    return shallow(detector, roi_heads=shallow(heads, forward=forward))


def _dense_twin(detector: Any, stage: Suppression) -> Any:
    """The twin of a one-stage detector; the feature maps are all that its head reads."""

    def forward(images: Any, targets: Any = None) -> Any:
        levels: list[Tensor] = []

        def read(maps: list[Tensor]) -> Any:
            levels.extend(maps)
            return detector.head.forward(maps)

        def suppress(outputs: Any, anchors: Any, image_sizes: Any) -> list[dict[str, Tensor]]:
            found = _lenient(detector).postprocess_detections(outputs, anchors, image_sizes)
            features = _feature_maps(detector, levels, image_sizes)
            return [_columns(kept) for kept in stage(features, [Detections(**columns) for columns in found])]

        head = shallow(detector.head, forward=read)
        return shallow(detector, head=head, postprocess_detections=suppress).forward(images, targets)

    return shallow(detector, forward=forward)


def _suppressor(detector: Any) -> Any:
    """The module with the method ``postprocess_detections`` and its thresholds."""
    return getattr(detector, "roi_heads", detector)


def _lenient(suppressor: Any) -> Any:
    """The same module, but suppressing nothing: no overlap is too large, no number of detections too high."""
    return shallow(suppressor, nms_thresh=math.inf, detections_per_img=sys.maxsize)


def _columns(found: Detections) -> dict[str, Tensor]:
    columns = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    return columns if found.ious is None else columns | {"ious": found.ious}


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
