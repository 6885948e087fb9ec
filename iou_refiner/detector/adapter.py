"""The contract between a detector framework and the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from iou_refiner.structures import Detections, FeatureMaps, Frame

#: What stands in the place of a detector's suppression: features and candidates in, detections out, image by image.
Suppression = Callable[[FeatureMaps, list[Detections]], list[Detections]]


class Adapter(Protocol):
    """What the core needs of a detector framework.

    Two more methods are optional. ``twin(stage)`` gives an object of the framework's own class whose suppression is
    ``stage``, where a detector is a live object. ``answer(*args)`` is the detector's own call with the arguments of
    :meth:`run`, where that is not ``detector(*args)``.

    Attributes:
        category_ids: dataset category id of each label, or None where labels are category ids already.
    """

    category_ids: dict[int, int] | None

    @property
    def detector(self) -> Any:
        """The framework's live detector, in inference mode; never modified."""

    @property
    def device(self) -> torch.device:
        """Where the features come out."""

    def to(self, device: torch.device | str) -> Adapter:
        """Move the detector; returns itself."""

    def fingerprint(self) -> str:
        """Hash of the detector's weights and buffers: what a head belongs to."""

    def settings(self) -> str:
        """What beside the weights decides an extraction: how images are prepared, which candidates pass."""

    def prepare(self, rgb: np.ndarray) -> tuple[Any, Frame]:
        """An RGB image (H, W, 3) uint8 as the detector takes it, and the frame from the one to the other."""

    def extract(self, images: Any) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """From a batch as the detector takes it: feature maps, candidates **before** suppression (one row per box and
        class, network frame), and per image the frame from the detector's input to the network input."""

    def run(self, stage: Suppression, *args: Any, **kwargs: Any) -> Any:
        """The detector's own call with its suppression replaced by ``stage``: its own result type, plus ``ious``."""
