"""torchvision's two-stage detectors: Faster R-CNN and what is built on it.

The detector itself is never touched. A call runs a shallow twin of it, which shares every weight and hook and differs
in one method: where the detector would suppress its boxes, the twin asks the stage. Whatever follows in the detector
(mask and keypoint heads, the way back to the image) then works on the boxes the stage returned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps, Frame, fingerprint
from iou_refiner._checks import require
from iou_refiner.extraction import Suppression


class TorchvisionAdapter:
    """Faster R-CNN of ``torchvision.models.detection``, and its Mask and Keypoint kin.

    Args:
        detector: the live detector.
        longest_side: if given, :meth:`prepare` scales images to it (with antialiasing) before the call, for detectors
            trained on images made so.

    Raises:
        TypeError: the detector is not of the Faster R-CNN family.
    """

    def __init__(self, detector: nn.Module, *, longest_side: int | None = None):
        heads = getattr(detector, "roi_heads", None)
        if heads is None or not hasattr(heads, "postprocess_detections") or not hasattr(detector, "transform"):
            raise TypeError(
                f"The torchvision adapter takes the Faster R-CNN family (.roi_heads), got {type(detector).__name__}."
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
        """How images are prepared and from which score on boxes are candidates."""
        transform, heads = self.detector.transform, self.detector.roi_heads
        return (
            f"longest_side={self.longest_side} min_size={transform.min_size} max_size={transform.max_size} "
            f"mean={transform.image_mean} std={transform.image_std} score_thresh={heads.score_thresh}"
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

    def run(self, stage: Suppression, images: Sequence[Tensor], targets: None = None) -> list[dict[str, Tensor]]:
        """The detector's own call with its suppression replaced by ``stage``; its own result, plus ``ious``."""
        kept: list[Detections] = []

        def keep(features: FeatureMaps, candidates: list[Detections], shapes: Sequence[tuple[int, int]]) -> Any:
            kept.extend(stage(features, candidates))
            return kept

        with torch.no_grad():
            results: list[dict[str, Tensor]] = _twin(self.detector, keep)(images)
        for result, detections in zip(results, kept, strict=True):
            if detections.ious is not None:
                result["ious"] = detections.ious
        return results

    def extract(self, images: Sequence[Tensor]) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """Feature maps, candidates before suppression (network frame), and the frame of each image."""
        seen: list[Any] = []

        def look(features: FeatureMaps, candidates: list[Detections], shapes: Sequence[tuple[int, int]]) -> Any:
            seen.append((features, candidates, shapes))
            return [detections[:0] for detections in candidates]

        with torch.no_grad():
            _twin(self.detector, look)(images)
        features, candidates, shapes = seen[0]
        frames = [
            Frame.resize((int(image.shape[-2]), int(image.shape[-1])), shape)
            for image, shape in zip(images, shapes, strict=True)
        ]
        return features, candidates, frames


def _twin(detector: Any, suppress: Callable[..., list[Detections]]) -> Any:
    """A shallow copy of the detector whose suppression is ``suppress(features, candidates, image_shapes)``."""
    heads = detector.roi_heads
    twin, twin_heads = _shallow(detector), _shallow(heads)
    twin._modules["roi_heads"] = twin_heads
    features: dict[str, Tensor] = {}

    def forward(maps: dict[str, Tensor], proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        features.update(maps)
        return type(heads).forward(twin_heads, maps, proposals, image_shapes, targets)

    def postprocess(class_logits: Tensor, box_regression: Tensor, proposals: Any, image_shapes: Any) -> Any:
        found = candidates(heads, class_logits, box_regression, proposals, image_shapes)
        names = heads.box_roi_pool.featmap_names
        kept = suppress(_feature_maps(features, names, image_shapes), found, image_shapes)
        return [d.boxes for d in kept], [d.scores for d in kept], [d.labels for d in kept]

    twin_heads.forward = forward
    twin_heads.postprocess_detections = postprocess
    return twin


def _shallow(module: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _feature_maps(
    maps: dict[str, Tensor], names: Sequence[str], image_shapes: Sequence[tuple[int, int]]
) -> FeatureMaps:
    """The levels the box head reads. Strides are powers of two; padding blurs them least on the longer side."""
    sides = [max(shape[axis] for shape in image_shapes) for axis in (0, 1)]
    axis = 0 if sides[0] >= sides[1] else 1
    levels = [maps[name] for name in names if name in maps]
    strides = [2.0 ** round(math.log2(sides[axis] / level.shape[2 + axis])) for level in levels]
    return FeatureMaps(tuple(levels), tuple(strides), tuple(image_shapes))


def candidates(
    heads: Any, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: Any
) -> list[Detections]:
    """What ``RoIHeads.postprocess_detections`` has before it suppresses: one row per box and class, image by image.

    Same operations in the same order, so that applying the detector's own NMS to them gives its own output bit for bit.
    """
    ops = require("torchvision.ops", extra="torchvision", purpose="A torchvision detector")
    num_classes = class_logits.shape[-1]
    counts = [len(boxes) for boxes in proposals]
    all_boxes = heads.box_coder.decode(box_regression, proposals).split(counts)  # (R_i, K + 1, 4) each
    all_scores = class_logits.softmax(-1).split(counts)
    found = []
    for boxes, scores, shape in zip(all_boxes, all_scores, image_shapes, strict=True):
        boxes = ops.clip_boxes_to_image(boxes, shape)[:, 1:].reshape(-1, 4)
        labels = torch.arange(1, num_classes, device=boxes.device).expand(len(scores), -1).reshape(-1)
        scores = scores[:, 1:].reshape(-1)
        rows = torch.nonzero(scores > heads.score_thresh).flatten()
        rows = rows[ops.remove_small_boxes(boxes[rows], min_size=1e-2)]
        found.append(Detections(boxes[rows], scores[rows], labels[rows]))
    return found
