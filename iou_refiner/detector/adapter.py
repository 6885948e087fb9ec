"""The contract between a detector framework and the core: one base class with defaults."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from iou_refiner.detector.fingerprint import fingerprint
from iou_refiner.structures import Detections, FeatureMaps, ImageTransform

#: What stands in the place of a detector's suppression: features and candidates in, detections out, image by image.
Suppression = Callable[[FeatureMaps, list[Detections]], list[Detections]]


@dataclass(frozen=True, eq=False)
class TrainingImage:
    """One image as a detector sees it in training; boxes float32 xyxy in network pixels, without gradients.

    Attributes:
        proposals: (P, 4), boxes that the detector itself proposed, best first.
        gt_boxes, gt_labels: (G, 4) and (G,) int64, the annotated objects, in the detector's own class numbers.
        ignored_boxes, ignored_labels: (K, 4) and (K,), regions in which boxes are not judged.
    """

    proposals: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    ignored_boxes: Tensor
    ignored_labels: Tensor

    @classmethod
    def of(
        cls, proposals: Tensor, gt: tuple[Tensor, Tensor], ignored: tuple[Tensor, Tensor] | None = None
    ) -> TrainingImage:
        """From boxes as a framework has them, each with its labels."""
        ignored = ignored or (gt[0][:0], gt[1][:0])
        boxes = [part.detach().float() for part in (proposals, gt[0], ignored[0])]
        return cls(boxes[0], boxes[1], gt[1].long(), boxes[2], ignored[1].long())


#: Boxes of each level that a one-stage detector proposes: more are hardly ever sampled, and sorting them costs.
MOST_PROPOSALS = 300

#: What is learned beside the detector's own losses: the features of a batch, with gradients, and its images in; losses
#: by name out, which are added to those of the detector.
AddedLosses = Callable[[FeatureMaps, list[TrainingImage]], dict[str, Tensor]]

#: The category ids of COCO's 80 classes in the order in which detectors number them: 1 to 90 with ten gaps.
COCO_CATEGORY_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))


A = TypeVar("A", bound="Adapter")


class Adapter(ABC):
    """A detector of some framework, as the core sees it.

    A subclass says how an image becomes the detector's input (:meth:`prepare`), how the detector runs with another
    suppression (:meth:`twin`), and where its images lie in the network input (:meth:`transforms`). The rest has
    defaults for a detector that is a torch module, called with a batch of images.

    Attributes:
        detector: the framework's live detector, in inference mode; never modified.
        category_ids: dataset category id of each label, or None where labels are category ids already.
    """

    detector: Any
    category_ids: dict[int, int] | None = None

    @abstractmethod
    def prepare(self, rgb: np.ndarray) -> tuple[Any, ImageTransform]:
        """An RGB image (H, W, 3) uint8 as the detector takes it, and the transform from the one to the other."""

    @abstractmethod
    def twin(self, suppression: Suppression) -> Any:
        """A detector of the same class that shares every weight, with ``suppression`` in place of its own.

        Its results have ``ious`` where the suppression gives them.
        """

    @abstractmethod
    def transforms(self, images: Any, features: FeatureMaps) -> list[ImageTransform]:
        """For each image of a batch, the transform from the detector's input, in whose pixels results are given, to the
        network input, whose maps are ``features``."""

    @abstractmethod
    def settings(self) -> str:
        """What beside the weights decides an extraction: how images are prepared, which boxes are candidates."""

    @property
    def name(self) -> str:
        """What to call the detector in a message: the class of the live object."""
        return type(self.detector).__name__

    @property
    def device(self) -> torch.device:
        """Where the features come out."""
        device: torch.device = next(self.detector.parameters()).device
        return device

    @property
    def training(self) -> bool:
        """Whether the detector is in training mode, in which it has no detections to refine."""
        training: bool = self.detector.training
        return training

    @property
    def nms_threshold(self) -> float | None:
        """IoU above which the detector's own greedy NMS removes a box of the same class, which boxes of categories that
        a head was not trained on get; None for a detector without NMS."""
        return 0.5

    def to(self: A, device: torch.device | str) -> A:
        """Move the detector; returns itself."""
        self.detector.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash of the detector's weights and buffers: what a head belongs to."""
        return fingerprint(self.detector)

    def detect(self, *args: Any, **kwargs: Any) -> Any:
        """The detector's own call, with its own suppression."""
        return self.detector(*args, **kwargs)

    def run(self, suppression: Suppression, *args: Any, **kwargs: Any) -> Any:
        """The detector's own call with its suppression replaced: its own result type, plus ``ious``."""
        with torch.no_grad():
            return self.twin(suppression)(*args, **kwargs)

    def losses(self, added: AddedLosses, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The detector's own training call: its losses, bit for bit, and those that ``added`` makes of what it saw.

        Optional: an adapter without it wraps and trains heads, but does not train its detector together with one.

        Raises:
            TypeError: the adapter, or this kind of detector, has no joint training.
        """
        raise TypeError(
            f"{self.name} cannot be trained together with a head: {type(self).__name__} has no `losses`. To train the "
            "detector alone, put the head in inference mode: refiner.head.eval()."
        )

    def extract(self, images: Any) -> tuple[FeatureMaps, list[Detections], list[ImageTransform]]:
        """From a batch as the detector takes it: feature maps, candidates **before** suppression (one row per box and
        class, network pixels), and :meth:`transforms`."""
        recorder = Recorder()
        self.run(recorder, images)
        return recorder.features, recorder.candidates, self.transforms(images, recorder.features)


class Recorder:
    """A suppression that remembers what it was given, and keeps no box, so that the detector has little left to do.

    Attributes:
        features, candidates: of the last call.
    """

    features: FeatureMaps
    candidates: list[Detections]

    def __call__(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """Remember; detections of no boxes."""
        self.features, self.candidates = features, candidates
        return [detections[:0] for detections in candidates]
