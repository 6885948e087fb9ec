"""Feature maps and candidates of the images of a data set, from a live detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the detector takes it: what can be made ready ahead of the detector.

    Attributes:
        image_id: of the data set.
        inputs: what :meth:`Adapter.prepare` returned.
        transform: from the image file (or the view of it) to these inputs.
        content, undecided: as in :class:`Extraction`.
    """

    image_id: int
    inputs: Any
    transform: ImageTransform
    content: str
    undecided: bool

    @property
    def shape(self) -> tuple[int, int]:
        """``(height, width)`` of the image before it was prepared. Images may share a batch where these are equal: then
        so are the inputs, and no image is padded for the sake of another."""
        return self.transform.image_size


def prepare_image(adapter: Adapter, folder: ImageFolder, image: Image, *, view: int = 0) -> Prepared:
    """Open an image of a data set, or another :class:`View` of it, and prepare it for the detector.

    Raises:
        DataError: as :meth:`ImageFolder.open`.
    """
    picture = folder.open(image)
    window = View.of(image.id, (image.height, image.width), view)
    inputs, transform = adapter.prepare(window.pixels(picture.rgb))
    return Prepared(image.id, inputs, transform, picture.content, picture.undecided)


def extract(adapter: Adapter, batch: Sequence[Prepared]) -> list[Extraction]:
    """Run the detector on one batch of prepared images."""
    features, candidates, to_network = adapter.extract([prepared.inputs for prepared in batch])
    return [
        Extraction(
            prepared.image_id, _of_image(features, row), candidates[row], prepared.transform.then(to_network[row]),
            prepared.content, prepared.undecided,
        )
        for row, prepared in enumerate(batch)
    ]  # fmt: skip


def extract_image(adapter: Adapter, images: str | Path | ImageFolder, image: Image, *, view: int = 0) -> Extraction:
    """Run the detector on one image of a data set, or on another :class:`View` of it.

    Raises:
        DataError: as :meth:`ImageFolder.open`.
    """
    folder = images if isinstance(images, ImageFolder) else ImageFolder(images)
    return extract(adapter, [prepare_image(adapter, folder, image, view=view)])[0]


def _of_image(features: FeatureMaps, row: int) -> FeatureMaps:
    """The maps of one image of a batch."""
    if len(features) == 1:
        return features
    levels = tuple(level[row : row + 1] for level in features.levels)
    return FeatureMaps(levels, features.strides, features.image_sizes[row : row + 1])
