"""Detectron2's R-CNN family (FPN, C4 and DC5; Faster, Mask, Keypoint and Cascade R-CNN), RetinaNet and FCOS.

All of them filter their boxes, suppress what overlaps, and go on with what is left. A call runs a shallow twin, which
shares every weight and hook of the detector: the twin filters as the detector does with its suppression switched off,
calls the suppression it was given, and goes on with the detections. Masks, keypoints and the way back to the image
therefore work on these.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps, ImageTransform
from iou_refiner.adapters.detectron2 import library
from iou_refiner.adapters.detectron2.losses import training_twin
from iou_refiner.adapters.twins import shallow
from iou_refiner.checks import check_choice, check_positive
from iou_refiner.detector.adapter import Adapter, AddedLosses, Suppression

# What switches the detectors' own suppression off: no overlap is above it, no image has more boxes.
_UNSUPPRESSED = {
    "test_nms_thresh": math.inf,
    "test_topk_per_image": sys.maxsize,
    "max_detections_per_image": sys.maxsize,
}
# Which boxes become candidates, wherever in the detector it is said.
_FILTERS = (
    "test_score_thresh", "test_topk_candidates", "pre_nms_topk", "post_nms_topk", "nms_thresh", "min_box_size",
)  # fmt: skip


class Detectron2Adapter(Adapter):
    """A live detector of Detectron2. Its input is Detectron2's: dicts of ``image`` (C, H, W), ``height``, ``width``.

    Args:
        detector: a ``GeneralizedRCNN`` with standard, cascade or C4 RoI heads, a ``RetinaNet`` or an ``FCOS``.
        min_size, max_size: shortest and longest side in pixels to which :meth:`prepare` resizes; ``min_size = 0`` does
            not resize. Detectron2 keeps them in its config (``INPUT.MIN_SIZE_TEST``), not in the detector.
        input_format: ``"BGR"`` or ``"RGB"``, the channels the detector was trained on. Default: what it says itself,
            else BGR.
        category_ids: dataset category id of each label, which Detectron2 counts from 0. Default: COCO's for 80 classes,
            else labels are ids.

    Raises:
        TypeError: the detector is of another kind (panoptic, semantic, rotated, proposals alone).
        ValueError: an argument is out of range.
        MissingPackageError: Detectron2 is missing or another version.
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        min_size: int = 800,
        max_size: int = 1333,
        input_format: str | None = None,
        category_ids: Mapping[int, int] | None = None,
    ):
        _check_kind(detector)
        self.detector = detector
        self.min_size, self.max_size = min_size, max_size
        self.input_format: str = input_format or getattr(detector, "input_format", None) or "BGR"
        check_positive("max_size", max_size)
        check_choice("input_format", self.input_format, ["BGR", "RGB"])
        if category_ids is None and getattr(detector, "roi_heads", detector).num_classes == 80:
            category_ids = library.category_ids("coco_2017_val")
        self.category_ids = None if category_ids is None else dict(category_ids)

    @classmethod
    def from_name(cls, name: str) -> Detectron2Adapter:
        """The detector of ``CONFIG.yaml`` or ``CONFIG.yaml:WEIGHTS``, the config a file or a name of the model zoo.

        Without WEIGHTS a config of the model zoo comes with the weights trained with it, a file with its
        ``MODEL.WEIGHTS``.

        Raises:
            DataError: no such config, or weights that do not fill the detector.
        """
        cfg = library.config(name)
        adapter = cls(
            library.module("modeling").build_model(cfg).eval(),
            min_size=cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
            input_format=cfg.INPUT.FORMAT,
            category_ids=library.category_ids(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None,
        )
        library.load(adapter.detector, cfg.MODEL.WEIGHTS)
        return adapter

    def settings(self) -> str:
        """How images are prepared, and which boxes are proposals and candidates."""
        mean, std = (buffer.flatten().tolist() for buffer in (self.detector.pixel_mean, self.detector.pixel_std))
        filters = [
            f"{path or 'detector'}.{name}={getattr(module, name)}"
            for path, module in self.detector.named_modules()
            for name in _FILTERS
            if hasattr(module, name)
        ]
        size = f"min_size={self.min_size} max_size={self.max_size} input_format={self.input_format}"
        return f"{size} mean={mean} std={std} {' '.join(filters)}"

    def prepare(self, rgb: np.ndarray) -> tuple[dict[str, Any], ImageTransform]:
        """An RGB image (H, W, 3) uint8 as the detector takes it: resized, (3, h, w) float32 from 0 to 255.

        The transform is that of the image itself: Detectron2 is told its ``height`` and ``width`` and gives results in
        its pixels. The scale between the two is in :meth:`transforms`.
        """
        height, width = rgb.shape[:2]
        pixels = rgb if self.input_format == "RGB" else rgb[:, :, ::-1]
        resize = library.module("data.transforms").ResizeShortestEdge([self.min_size] * 2, self.max_size)
        resized = resize.get_transform(pixels).apply_image(pixels)
        image = torch.from_numpy(resized.astype(np.float32).transpose(2, 0, 1).copy()).to(self.device)
        return {"image": image, "height": height, "width": width}, ImageTransform((height, width))

    def twin(self, suppression: Suppression) -> Any:
        """A detector of the same class that shares every weight, with ``suppression`` in place of its own.

        Its ``Instances`` have a field ``ious`` where the suppression gives them.
        """
        shapes, twin = self.detector.backbone.output_shape(), shallow(self.detector)
        if hasattr(twin, "roi_heads"):
            names = twin.roi_heads.in_features
            suppress = _on_instances(suppression, [shapes[name].stride for name in names])
            twin._modules["roi_heads"] = _roi_heads_twin(
                twin.roi_heads, lambda maps, candidates: suppress([maps[name] for name in names], candidates)
            )
        else:
            suppress = _on_instances(suppression, [shapes[name].stride for name in twin.head_in_features])

            def forward_inference(images: Any, features: list[Tensor], predictions: list[list[Tensor]]) -> Any:
                candidates = type(twin).forward_inference(_unsuppressed(twin), images, features, predictions)
                return suppress(features, candidates)

            twin.forward_inference = forward_inference
        return twin

    def losses(self, added: AddedLosses, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The detector's own training call, within an ``EventStorage`` as always, and the losses of ``added``."""
        losses: dict[str, Tensor] = training_twin(self.detector, added)(*args, **kwargs)
        return losses

    def transforms(self, images: Sequence[dict[str, Any]], features: FeatureMaps) -> list[ImageTransform]:
        """From the image of ``height`` x ``width`` pixels, in which results are given, to the network input.

        RetinaNet and FCOS clip boxes to the image after suppression only: their candidates may reach beyond it.
        """
        return [
            ImageTransform.resize((image.get("height", size[0]), image.get("width", size[1])), size)
            for image, size in zip(images, features.image_sizes, strict=True)
        ]


def _check_kind(detector: Any) -> None:
    """Raise TypeError unless the detector is one whose suppression is known."""
    modeling, roi_heads = library.module("modeling"), library.module("modeling.roi_heads")
    name = type(detector).__name__
    if isinstance(detector, (modeling.RetinaNet, modeling.FCOS)):
        return
    if isinstance(detector, modeling.GeneralizedRCNN) and not isinstance(detector, modeling.PanopticFPN):
        heads = detector.roi_heads
        known = isinstance(heads, (roi_heads.StandardROIHeads, roi_heads.Res5ROIHeads))
        if known and not isinstance(heads, roi_heads.RROIHeads):
            return
        name += f" with {type(heads).__name__}"
    raise TypeError(
        "The Detectron2 adapter takes GeneralizedRCNN with StandardROIHeads, CascadeROIHeads or Res5ROIHeads, "
        f"RetinaNet and FCOS (no panoptic, semantic or rotated detector), got {name}."
    )


def _unsuppressed(module: nn.Module) -> Any:
    """A shallow copy that filters boxes as the module does, and keeps all that overlap."""
    twin = shallow(module)
    if isinstance(module, nn.ModuleList):  # a box predictor for each stage of a cascade
        twin._modules = {name: _unsuppressed(part) for name, part in module.named_children()}
    else:
        vars(twin).update(_UNSUPPRESSED)
    return twin


def _roi_heads_twin(heads: Any, suppress: Callable[[dict[str, Tensor], list[Any]], list[Any]]) -> Any:
    """RoI heads that go on with what ``suppress`` makes of the maps and all candidates."""
    twin = shallow(heads)

    def forward(images: Any, features: dict[str, Tensor], proposals: list[Any], targets: Any = None) -> Any:
        # Of the twin as it is now: test-time augmentation switches its mask head off and on between calls. Only here
        # do the boxes given to `forward_with_given_boxes` come from the box predictor; others are not to be touched.
        once = shallow(twin)
        once._modules["box_predictor"] = _unsuppressed(twin.box_predictor)
        once.forward_with_given_boxes = lambda maps, boxes: twin.forward_with_given_boxes(maps, suppress(maps, boxes))
        return type(heads).forward(once, images, features, proposals, targets)

    twin.forward = forward
    return twin


def _on_instances(
    suppression: Suppression, strides: Sequence[float]
) -> Callable[[Sequence[Tensor], list[Any]], list[Any]]:
    """``suppression`` for Detectron2's ``Instances``: maps and candidates in, detections out."""
    structures = library.module("structures")

    def suppress(maps: Sequence[Tensor], candidates: list[Any]) -> list[Any]:
        sizes = tuple(instances.image_size for instances in candidates)
        features = FeatureMaps(tuple(maps), tuple(strides), sizes)
        rows = [Detections(image.pred_boxes.tensor, image.scores, image.pred_classes) for image in candidates]
        results = []
        for image, size in zip(suppression(features, rows), sizes, strict=True):
            # Detectron2 scales boxes in place on the way back to the image: not those the suppression may still hold.
            boxes = structures.Boxes(image.boxes.clone())
            instances = structures.Instances(size, pred_boxes=boxes, scores=image.scores, pred_classes=image.labels)
            if image.ious is not None:
                instances.ious = image.ious
            results.append(instances)
        return results

    return suppress
