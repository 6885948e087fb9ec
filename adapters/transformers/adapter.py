"""Hugging Face transformers: RT-DETR, RT-DETRv2, D-FINE, DETR and Deformable DETR.

These detectors have no NMS. Their image processor selects rows, a query and a class each, and drops those whose score
is not above the threshold. The stage comes between the two: its candidates are the rows selected, and the threshold
judges the scores it gives. They hold few duplicates: ``nms="none"`` is the setting that suppresses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import DataError, Detections, FeatureMaps, Frame, fingerprint
from iou_refiner.adapters.transformers.twins import twin_model, twin_pipeline, twin_processor
from iou_refiner.checks import require
from iou_refiner.coco.data import COCO_IDS
from iou_refiner.detector.adapter import Suppression

_KINDS = (
    "RTDetrForObjectDetection",
    "RTDetrV2ForObjectDetection",
    "DFineForObjectDetection",
    "DetrForObjectDetection",
    "DeformableDetrForObjectDetection",
)


class ObjectDetector(nn.Module):
    """A model and its image processor as one detector: images in, detections out.

    Args:
        model: the live model.
        processor: the image processor it was trained with.
    """

    def __init__(self, model: Any, processor: Any):
        super().__init__()
        self.model, self.processor = model, processor
        self.training = model.training

    def forward(self, images: Sequence[Any], threshold: float = 0.5) -> list[dict[str, Tensor]]:
        """Detections scored above ``threshold``, as ``post_process_object_detection`` gives them, boxes in pixels.

        Args:
            images: what pipelines take, PIL images or paths or URLs.
            threshold: see ``post_process_object_detection``.
        """
        pictures = _load(images)
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device, self.model.dtype)
        with torch.no_grad():
            outputs = self.model(**inputs)
            sizes = [(picture.height, picture.width) for picture in pictures]
            found: list[dict[str, Tensor]] = self.processor.post_process_object_detection(outputs, threshold, sizes)
        return found


class TransformersAdapter:
    """A detector of transformers: an object detection pipeline, or a model with its image processor.

    Args:
        detector: the pipeline, or the model. The one is called as ever, the other as :class:`ObjectDetector` is.
        processor: the image processor of the model. Default: the one saved with the weights the model was loaded from.

    Raises:
        TypeError: the model is of another kind, or its processor cannot be found.
    """

    def __init__(self, detector: Any, processor: Any = None):
        pipeline = isinstance(detector, _transformers().ObjectDetectionPipeline)
        if pipeline and processor is not None:
            raise TypeError("`processor` must be left out with a pipeline, which has its own.")
        self.model: Any = detector.model if pipeline else detector
        if not {kind.__name__ for kind in type(self.model).__mro__} & set(_KINDS):
            raise TypeError(
                f"The transformers adapter takes a pipeline or model of {', '.join(_KINDS)}, "
                f"got {type(self.model).__name__}."
            )
        if pipeline:
            self.processor: Any = detector.image_processor
        else:
            self.processor = _saved_processor(self.model) if processor is None else processor
        self.detector: Any = detector if pipeline else ObjectDetector(self.model, self.processor)
        names = self.model.config.id2label
        coco = len(names) == len(COCO_IDS) and (names[0], names[79]) == ("person", "toothbrush")
        self.category_ids: dict[int, int] | None = dict(enumerate(COCO_IDS)) if coco else None

    @classmethod
    def from_name(cls, name: str) -> TransformersAdapter:
        """The detector saved in the folder ``name``, or of that name on the hub.

        Raises:
            DataError: there is none.
        """
        transformers = _transformers()
        try:
            model = transformers.AutoModelForObjectDetection.from_pretrained(name)
            return cls(model.eval(), transformers.AutoImageProcessor.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise DataError(f"The detector {name!r} cannot be loaded ({error}).") from error

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = self.model.device
        return device

    def to(self, device: torch.device | str) -> TransformersAdapter:
        """Move the detector."""
        self.model.to(device)
        if not isinstance(self.detector, ObjectDetector):
            self.detector.device = self.model.device  # where a pipeline sends its inputs
        return self

    def fingerprint(self) -> str:
        """Hash of all weights and buffers of the model."""
        return fingerprint(self.model)

    def settings(self) -> str:
        """How images are prepared: all that the image processor says about itself."""
        described: str = self.processor.to_json_string()
        return described

    def prepare(self, rgb: np.ndarray) -> tuple[Any, Frame]:
        """An RGB image (H, W, 3) uint8 as a PIL image, and the frame between, which changes nothing."""
        image = require("PIL.Image", extra="transformers", purpose="A transformers detector")
        return image.fromarray(rgb), Frame((rgb.shape[0], rgb.shape[1]))

    def twin(self, stage: Suppression) -> Any:
        """A detector of the same class that shares every weight and whose detections are what ``stage`` keeps.

        The twin of an :class:`ObjectDetector` has a ``model`` and a ``processor`` that may be used by themselves, with
        each other, as transformers' own: what ``post_process_object_detection`` returns holds ``ious``.
        """
        model, processor = twin_model(self.model, self.processor, stage), twin_processor(self.processor)
        if isinstance(self.detector, ObjectDetector):
            return ObjectDetector(model, processor)
        return twin_pipeline(self.detector, model, processor)

    def run(self, stage: Suppression, *args: Any, **kwargs: Any) -> Any:
        """The detector's own call with what it selects handed to ``stage`` first; its own result, plus ``ious``.

        A pipeline names it ``iou``, one to each detection. Its boxes are whole pixels, as ever.
        """
        return self.twin(stage)(*args, **kwargs)

    def extract(self, images: Sequence[Any]) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """Feature maps, the rows transformers selects at any score (network frame), and the frame of each image."""
        seen: list[tuple[FeatureMaps, list[Detections]]] = []

        def look(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            seen.append((features, candidates))
            return candidates

        pictures = _load(images)
        ObjectDetector(twin_model(self.model, self.processor, look), twin_processor(self.processor))(pictures)
        features, candidates = seen[0]
        sizes = zip(pictures, features.image_sizes, strict=True)
        return features, candidates, [Frame.resize((image.height, image.width), size) for image, size in sizes]


def _transformers() -> Any:
    return require("transformers", extra="transformers", purpose="A transformers detector")


def _load(images: Sequence[Any]) -> list[Any]:
    """Images as RGB PIL images, upright, as pipelines load them."""
    utils = require("transformers.image_utils", extra="transformers", purpose="A transformers detector")
    return [utils.load_image(image) for image in images]


def _saved_processor(model: Any) -> Any:
    name = model.config._name_or_path
    cure = "Pass a pipeline, or TransformersAdapter(model, processor)."
    if not name:
        raise TypeError(f"`processor` is missing, and the model was not loaded from anywhere it could be found. {cure}")
    try:
        return _transformers().AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise TypeError(f"`processor` is missing, and none is saved in {name!r}. {cure}") from error
