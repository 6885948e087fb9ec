"""Hugging Face transformers: RT-DETR, RT-DETRv2, D-FINE, DETR and Deformable DETR.

These detectors have no NMS. Their image processor selects rows, a query and a class each, and drops those whose score
is not above the threshold. A suppression comes between the two: its candidates are the rows selected, and the threshold
is applied to the scores it returns. They hold few duplicates: with ``nms="none", final_nms="none"`` the stage
suppresses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import DataError, Detections, FeatureMaps, ImageTransform, fingerprint
from iou_refiner.adapters.transformers.twins import twin_model, twin_pipeline, twin_processor
from iou_refiner.adapters.weights import tensors_only, trusts_pickles
from iou_refiner.checks import require
from iou_refiner.detector.adapter import COCO_CATEGORY_IDS, Adapter, Recorder, Suppression

_KINDS = (
    "RTDetrForObjectDetection",
    "RTDetrV2ForObjectDetection",
    "DFineForObjectDetection",
    "DetrForObjectDetection",
    "DeformableDetrForObjectDetection",
)
# Python files that come with weights are not run, and nobody is asked whether they should be.
_NO_CODE = {"trust_remote_code": False}


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
            results: list[dict[str, Tensor]] = self.processor.post_process_object_detection(outputs, threshold, sizes)
        return results


class TransformersAdapter(Adapter):
    """A detector of transformers: an object detection pipeline, or a model with its image processor.

    Args:
        detector: the pipeline, or the model. A pipeline is called as ever, a model as :class:`ObjectDetector` is.
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
        self.detector = detector if pipeline else ObjectDetector(self.model, self.processor)
        names = self.model.config.id2label
        coco = len(names) == len(COCO_CATEGORY_IDS) and (names[0], names[79]) == ("person", "toothbrush")
        self.category_ids = dict(enumerate(COCO_CATEGORY_IDS)) if coco else None

    @classmethod
    def from_name(cls, name: str) -> TransformersAdapter:
        """The detector saved in the folder ``name``, or of that name on the hub.

        Raises:
            DataError: there is none, or it would run code that comes with it.
        """
        transformers = _transformers()
        try:
            config = transformers.AutoConfig.from_pretrained(name, **_NO_CODE)
            _check_attention(name, config)
            weights = {"config": config, "weights_only": not trusts_pickles()}
            with tensors_only(name, str(Path(name, "pytorch_model.bin"))):
                model = transformers.AutoModelForObjectDetection.from_pretrained(name, **weights, **_NO_CODE)
            return cls(model.eval(), transformers.AutoImageProcessor.from_pretrained(name, **_NO_CODE))
        except DataError:
            raise
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

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        training: bool = self.model.training
        return training

    def fingerprint(self) -> str:
        """Hash of all weights and buffers of the model."""
        return fingerprint(self.model)

    def settings(self) -> str:
        """How images are prepared: all that the image processor says about itself."""
        described: str = self.processor.to_json_string()
        return described

    def prepare(self, rgb: np.ndarray) -> tuple[Any, ImageTransform]:
        """An RGB image (H, W, 3) uint8 as a PIL image, and the transform between, which changes nothing."""
        image = require("PIL.Image", extra="transformers", purpose="A transformers detector")
        return image.fromarray(rgb), ImageTransform((rgb.shape[0], rgb.shape[1]))

    def twin(self, suppression: Suppression) -> Any:
        """A detector of the same class that shares every weight, with ``suppression`` before its score threshold.

        Where the suppression gives ``ious``, the twin of a pipeline has an ``iou`` in each detection; its boxes are
        whole pixels, as ever. The twin of an :class:`ObjectDetector` has a ``model`` and a ``processor`` that may be
        used by themselves, with each other, as transformers' own: ``post_process_object_detection`` then returns
        ``ious`` too.
        """
        model, processor = twin_model(self.model, self.processor, suppression), twin_processor(self.processor)
        if isinstance(self.detector, ObjectDetector):
            return ObjectDetector(model, processor)
        return twin_pipeline(self.detector, model, processor)

    def extract(self, images: Sequence[Any]) -> tuple[FeatureMaps, list[Detections], list[ImageTransform]]:
        """Feature maps, the rows transformers selects at any score (network pixels), and :meth:`transforms`.

        All images are one batch, also where the detector is a pipeline, which takes them one by one.
        """
        recorder, pictures = Recorder(), _load(images)
        ObjectDetector(twin_model(self.model, self.processor, recorder), twin_processor(self.processor))(pictures)
        return recorder.features, recorder.candidates, self.transforms(pictures, recorder.features)

    def transforms(self, images: Sequence[Any], features: FeatureMaps) -> list[ImageTransform]:
        """From each image to the network input."""
        sizes = zip(_load(images), features.image_sizes, strict=True)
        return [ImageTransform.resize((image.height, image.width), size) for image, size in sizes]


def _transformers() -> Any:
    return require("transformers", extra="transformers", purpose="A transformers detector")


def _check_attention(name: str, config: Any) -> None:
    """Raise DataError where the config asks for attention kernels of the hub, which are compiled code."""
    for part in (config, getattr(config, "backbone_config", None)):
        kernels = getattr(part, "_attn_implementation", None)
        if kernels and "/" in str(kernels):
            raise DataError(
                f"The detector {name!r} cannot be loaded: its config.json asks for the kernels {kernels!r}, which are "
                "code. Remove `attn_implementation` from it."
            )


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
        return _transformers().AutoImageProcessor.from_pretrained(name, **_NO_CODE)
    except OSError as error:
        raise TypeError(f"`processor` is missing, and none is saved in {name!r}. {cure}") from error
