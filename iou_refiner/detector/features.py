"""Feature maps and candidates of the images of a data set, from a live detector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.images import ImageFolder
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
        content: SHA-256 of the image file; empty where there is none.
        undecided: of the image's orientation, see :class:`~iou_refiner.detector.images.Picture`.
    """

    image_id: int
    features: FeatureMaps
    candidates: Detections
    transform: ImageTransform
    content: str = ""
    undecided: bool = False

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes on disk with features of ``dtype``."""
        cells = sum(level.numel() for level in self.features.levels)
        return cells * dtype.itemsize + len(self.candidates) * 28


def extract_image(adapter: Adapter, images: str | Path | ImageFolder, image: Image, *, view: int = 0) -> Extraction:
    """Run the detector on one image of a data set, or on another :class:`View` of it.

    Raises:
        DataError: as :meth:`ImageFolder.open`.
    """
    folder = images if isinstance(images, ImageFolder) else ImageFolder(images)
    picture = folder.open(image)
    window = View.of(image.id, (image.height, image.width), view)
    prepared, to_input = adapter.prepare(window.pixels(picture.rgb))
    features, (candidates,), (to_network,) = adapter.extract([prepared])
    transform = to_input.then(to_network)
    return Extraction(image.id, features, candidates, transform, picture.content, picture.undecided)
