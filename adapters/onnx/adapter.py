"""Exported detectors: a graph in an ONNX file, run by onnxruntime on the CPU.

The graph is rewritten in memory so that it also returns its feature maps; the file is only read. What goes in and comes
out is said by an :class:`OnnxLayout`. The detector's input is the image itself, RGB (H, W, 3) uint8 of any size:
letterboxing belongs to the detector, and the transform of each image says where it went.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from iou_refiner import DataError, Detections, FeatureMaps, ImageTransform
from iou_refiner.adapters.onnx import graph as graphs
from iou_refiner.adapters.onnx.boxes import read_boxes
from iou_refiner.adapters.onnx.images import check_image, check_stride, place, stack, stride_of
from iou_refiner.adapters.onnx.layouts import LAYOUTS, OnnxLayout
from iou_refiner.adapters.onnx.network import Network
from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.checks import check_choice
from iou_refiner.detector.adapter import COCO_CATEGORY_IDS, Adapter, Suppression
from iou_refiner.stage.nms import nms


class OnnxAdapter(Adapter):
    """A detector exported to ONNX. It is called like one: ``adapter([rgb, ...])`` gives its own result.

    Args:
        path: the ONNX file, with one float32 input (1, 3, H, W) or (3, H, W). Never changed.
        layout: what its input and outputs mean, or the name of a common one: ``"yolox"``, ``"yolov8"``, ``"detr"``,
            ``"rt-detr"``.
        changes: fields of the layout to exchange, such as ``features`` or ``score_threshold``.

    Raises:
        TypeError: ``path`` is no path.
        DataError: the file cannot be read, or is not of the layout.
        ValueError: a tensor cannot be found, the feature maps do not fit together, or a setting is out of range.

    Warns:
        UserWarning: the boxes come out of an NMS inside the graph, so that there is nothing left to suppress.
    """

    def __init__(self, path: str | Path, layout: OnnxLayout | str = "yolox", **changes: Any):
        if isinstance(layout, str):
            check_choice("layout", layout, LAYOUTS)
            layout = LAYOUTS[layout]
        if not isinstance(path, (str, Path)):
            raise TypeError(f"The ONNX adapter takes the path of an ONNX file, got {type(path).__name__}.")
        self.path, self.layout = Path(path), layout.replace(**changes)
        model, digest = graphs.load(self.path)
        self._fingerprint: str = digest
        self._boxes = self._find_boxes(model)
        self.features = self._find_features(model)
        named = (self._boxes, self.layout.scores, self.layout.labels, *self.features)
        self._network = Network(model, [name for name in named if name], self.layout, self.path)
        self.input_size = self._network.input_size
        self._try_blank_image()

    @classmethod
    def from_name(cls, name: str) -> OnnxAdapter:
        """The detector in the file ``name``, of the layout in ``FILE.layout.json`` beside it, else a YOLOX export.

        ``detectors/some.onnx`` is described by ``detectors/some.layout.json``, see :meth:`OnnxLayout.read`.
        """
        described = Path(name).with_suffix(".layout.json")
        return cls(name, OnnxLayout.read(described)) if described.is_file() else cls(name)

    def _find_boxes(self, model: Any) -> str:
        """The name of the tensor of boxes; checks the other names of the layout as well."""
        layout = self.layout
        outputs: list[str] = [output.name for output in model.graph.output]
        if layout.boxes is None and len(outputs) != 1:
            raise DataError(
                f"{self.path} returns {', '.join(map(repr, outputs))}: say which holds the boxes with `boxes`, and "
                "which the scores with `scores`."
            )
        if layout.box_format == "yolox":
            graphs.check_raw(model, self.path)
        for argument in ("boxes", "scores", "labels"):
            if getattr(layout, argument) is not None:
                graphs.check_name(argument, getattr(layout, argument), model, self.path)
        boxes = layout.boxes or outputs[0]
        suppressions = graphs.operators(model, "NonMaxSuppression")
        if layout.labels and suppressions and suppressions <= graphs.upstream(model, boxes):
            warnings.warn(
                f"{self.path} gives {boxes!r} after its own NMS: there is nothing left to suppress, only rescoring and "
                "refinement act. Name the tensors from before its NonMaxSuppression if the graph has them.",
                stacklevel=3,
            )
        return boxes

    def _find_features(self, model: Any) -> list[str]:
        if self.layout.features is None:
            neck: list[str] = graphs.yolox_neck(model, self.path)
            return neck
        for name in self.layout.features:
            graphs.check_name("features", name, model, self.path)
        # A head that learned from other maps must not pass for one that belongs here.
        names = list(self.layout.features)
        self._fingerprint = hashlib.sha256(f"{self._fingerprint} {names}".encode()).hexdigest()
        return names

    def _try_blank_image(self) -> None:
        """Learn what the graph returns, and refuse what does not fit, from one blank image."""
        tensors = self._network(place(np.zeros((*self.input_size, 3), np.uint8), self.layout, self.input_size)[0])
        classes = read_boxes(tensors, self._boxes, self.layout, self.input_size)[1].shape[1]
        ids = self.layout.category_ids
        if self.layout.labels is None and ids is not None and len(ids) != classes:
            raise ValueError(f"`category_ids` must name the {classes} classes of {self.path}, got {len(ids)} ids.")
        if ids is None and self.layout.labels is None and classes == len(COCO_CATEGORY_IDS):
            ids = COCO_CATEGORY_IDS
        self.category_ids = None if ids is None else dict(enumerate(ids))
        maps = tuple(tensors[name] for name in self.features)
        strides = self.layout.strides
        if strides is None:
            strides = tuple(stride_of(name, tensors[name], self.input_size) for name in self.features)
        self.strides = FeatureMaps(maps, strides, (self.input_size,)).strides
        if list(self.strides) != sorted(self.strides):
            raise ValueError(f"`features` must go from fine to coarse, got strides {self.strides}. Reorder the names.")
        self._shapes = [level.shape[1:] for level in maps]

    @property
    def detector(self) -> OnnxAdapter:
        """What is called for the detector's own result: this object."""
        return self

    @property
    def training(self) -> bool:
        """Never: an exported graph does not train."""
        return False

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    @property
    def nms_threshold(self) -> float | None:
        """That of the layout."""
        threshold: float | None = self.layout.nms_threshold
        return threshold

    def to(self, device: torch.device | str) -> OnnxAdapter:
        """Stay on the CPU; any other device is refused."""
        if torch.device(device).type != "cpu":
            raise ValueError(
                f"`device` must be 'cpu' for an ONNX detector, which onnxruntime runs there, got {str(device)!r}. "
                "Use the detector it was exported from to run on another device."
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the file (and of the weight files beside it); with ``features``, of that and their names."""
        return self._fingerprint

    def settings(self) -> str:
        """Which maps are the features, above which score boxes are candidates, and what else differs from YOLOX."""
        told = f"features={self.features} score_threshold={self.layout.score_threshold}"
        silent = ("features", "score_threshold", "nms_threshold", "category_ids")
        names = [field.name for field in fields(OnnxLayout) if field.name not in silent]
        differing = [name for name in names if getattr(self.layout, name) != getattr(LAYOUTS["yolox"], name)]
        return " ".join([told, *(f"{name}={getattr(self.layout, name)!r}" for name in differing)])

    def prepare(self, rgb: np.ndarray) -> tuple[np.ndarray, ImageTransform]:
        """The image itself: RGB (H, W, 3) uint8 is what the detector takes."""
        check_image("rgb", rgb)
        return rgb, ImageTransform((rgb.shape[0], rgb.shape[1]))

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        """Detections after :meth:`suppress`.

        Args:
            images: RGB (H, W, 3) uint8 each, of any sizes.

        Returns:
            One dict per image, rows as the suppression ordered them: ``boxes`` (N, 4) float32 xyxy in pixels of the
            image, clipped to it, ``scores`` (N,), ``labels`` (N,) from 0, and ``ious`` (N,) if the suppression gave
            them.
        """
        with torch.no_grad():
            features, candidates, transforms = self.extract(images)
            detections = zip(self.suppress(features, candidates), transforms, strict=True)
            return [transform.detections_to_image(image).to_dict() for image, transform in detections]

    def suppress(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """The detector's own suppression: greedy NMS per class; without a threshold, it only sorts by score."""
        if self.layout.nms_threshold is None:
            return [image[image.scores.argsort(descending=True, stable=True)] for image in candidates]
        threshold = self.layout.nms_threshold
        return [image[nms(image.boxes, image.scores, image.labels, threshold=threshold)] for image in candidates]

    def twin(self, suppression: Suppression) -> OnnxAdapter:
        """The same detector, which shares all with this one, with ``suppression`` in place of its own."""
        twin: Any = copy.copy(self)
        twin.suppress = suppression
        return cast(OnnxAdapter, twin)

    def transforms(self, images: Sequence[np.ndarray], features: FeatureMaps) -> list[ImageTransform]:
        """From each image to the network input."""
        return [place(rgb, self.layout, self._network.size_for("images", rgb))[2] for rgb in images]

    def extract(self, images: Sequence[np.ndarray]) -> tuple[FeatureMaps, list[Detections], list[ImageTransform]]:
        """Feature maps, candidates before suppression, and the transform of each image to the network input.

        Candidates are clipped to the image, so that none reaches into the padding.
        """
        maps: list[list[Tensor]] = [[] for _ in self.features]
        sizes, candidates, transforms = [], [], []
        for index, rgb in enumerate(images):
            check_image(f"images[{index}]", rgb)
            size = self._network.size_for(f"images[{index}]", rgb)
            pixels, reach, transform = place(rgb, self.layout, size)
            tensors = self._network(pixels)
            for level, name, stride in zip(maps, self.features, self.strides, strict=True):
                level.append(tensors[name])
                if size != self.input_size:
                    check_stride(name, tensors[name], stride, size)
            candidates.append(self._candidates(tensors, size, reach, transform))
            sizes.append(reach)
            transforms.append(transform)
        levels = tuple(stack(level, shape) for level, shape in zip(maps, self._shapes, strict=True))
        return FeatureMaps(levels, self.strides, tuple(sizes)), candidates, transforms

    def _candidates(
        self, tensors: dict[str, Tensor], size: tuple[int, int], reach: tuple[int, int], transform: ImageTransform
    ) -> Detections:
        boxes, scores, labels = read_boxes(tensors, self._boxes, self.layout, size)
        boxes = clip_boxes(boxes, reach).maximum(boxes.new_tensor(transform.offset * 2))
        rows, columns = torch.nonzero((scores > self.layout.score_threshold) & valid_boxes(boxes)[:, None]).unbind(1)
        return Detections(boxes[rows], scores[rows, columns], labels[rows, columns])
