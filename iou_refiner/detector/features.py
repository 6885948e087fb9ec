"""Feature maps and candidates of the images of a data set, from a live detector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from iou_refiner.checks import DataError, require
from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.views import View
from iou_refiner.structures import Detections, FeatureMaps, ImageTransform


@dataclass(frozen=True, eq=False)
class Extraction:
    """The feature maps and candidates that a frozen detector has for one image.

    Attributes:
        image_id: of the data set.
        features: one image of feature maps.
        candidates: boxes before suppression, network pixels.
        transform: from the image file (or the view of it) to the network input.
    """

    image_id: int
    features: FeatureMaps
    candidates: Detections
    transform: ImageTransform

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes on disk with features of ``dtype``."""
        cells = sum(level.numel() for level in self.features.levels)
        return cells * dtype.itemsize + len(self.candidates) * 28


def open_image(folder: str | Path, image: Image) -> np.ndarray:
    """The pixels (H, W, 3) uint8 RGB of an image of a data set.

    Raises:
        DataError: the file is missing, unreadable, or not of the size the annotation gives.
    """
    pil = require("PIL.Image", extra="torchvision", purpose="Reading images")
    path = Path(folder) / image.file_name
    try:
        with pil.open(path) as file:
            rgb: np.ndarray = np.asarray(file.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"Image {image.id}: {path} does not exist. Check --images.") from None
    except OSError as error:
        raise DataError(f"Image {image.id}: {path} cannot be read ({error}).") from None
    if rgb.shape[:2] != (image.height, image.width):
        raise DataError(
            f"Image {image.id}: {path} is {rgb.shape[1]} x {rgb.shape[0]} pixels, its annotation says "
            f"{image.width} x {image.height}. The boxes would not fit; use the images the annotation was made for."
        )
    return rgb


def extract_image(adapter: Adapter, folder: str | Path, image: Image, *, view: int = 0) -> Extraction:
    """Run the detector on one image of a data set, or on another :class:`View` of it."""
    window = View.of(image.id, (image.height, image.width), view)
    prepared, to_input = adapter.prepare(window.pixels(open_image(folder, image)))
    features, (candidates,), (to_network,) = adapter.extract([prepared])
    return Extraction(image.id, features, candidates, to_input.then(to_network))
