"""Features straight from the detector, image after image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.ahead import ahead
from iou_refiner.detector.features import Extraction, Prepared, extract, extract_image, prepare_image
from iou_refiner.detector.images import ImageFolder
from iou_refiner.detector.loading import Loading
from iou_refiner.detector.noticed import Noticed
from iou_refiner.structures import FeatureMaps

# Batches' worth of images among which those of one shape are looked for.
_WINDOW = 4


class LiveFeatures:
    """A :data:`FeatureSource`: the live detector on the images of a folder.

    Args:
        adapter: the detector.
        images: the folder.
        loading: how images reach the detector.
        dtype: what to round features to before they are given, in float32 again; so a head learns the same, to the bit,
            as from a cache of this precision. None for features as they are.
    """

    def __init__(
        self,
        adapter: Adapter,
        images: str | Path | ImageFolder,
        *,
        loading: Loading | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.adapter, self.loading, self.dtype = adapter, loading or Loading(), dtype
        self.images = images if isinstance(images, ImageFolder) else ImageFolder(images)
        self._noticed = Noticed()

    def missing(self, images: Iterable[Image], *, view: int = 0) -> list[Image]:
        """Those of ``images`` that cannot be had from here: none."""
        return []

    def load(self, image: Image, *, view: int = 0) -> Extraction:
        """Run the detector on one view of an image."""
        extraction = extract_image(self.adapter, self.images, image, view=view)
        self._noticed.add(extraction)
        return self._widened(self._rounded(extraction))

    def __call__(self, image: Image) -> Extraction:
        """Run the detector on an image."""
        return self.load(image)

    def stream(self, items: Iterable[tuple[Image, int]]) -> Iterator[Extraction]:
        """:meth:`load` for many views of images, ``(image, view)`` each, in their order.

        Images are opened and prepared ahead, in threads. On an accelerator images of one shape go through the detector
        together; one by one on a CPU, where a batch is slower.
        """
        prepared = ahead(
            lambda item: prepare_image(self.adapter, self.images, item[0], view=item[1]), items, self.loading.workers
        )
        size = 1 if self.adapter.device.type == "cpu" else self.loading.batch_images
        while window := list(islice(prepared, _WINDOW * size if size > 1 else 1)):
            for extraction in self._detected(window, size):
                self._noticed.add(extraction)
                yield self._widened(extraction)

    def notes(self) -> list[str]:
        """What the user should know of the images since this was last called, a sentence each."""
        return self._noticed.notes()

    def _detected(self, window: list[Prepared], size: int) -> list[Extraction]:
        """The extractions of some images, from batches of at most ``size`` images of one shape."""
        rows_of: dict[tuple[int, int], list[int]] = {}
        for row, prepared in enumerate(window):
            rows_of.setdefault(prepared.shape, []).append(row)
        extractions: dict[int, Extraction] = {}
        for rows in rows_of.values():
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                done = extract(self.adapter, [window[row] for row in batch])
                extractions |= zip(batch, map(self._rounded, done), strict=True)
        return [extractions[row] for row in range(len(window))]

    def _rounded(self, extraction: Extraction) -> Extraction:
        return extraction if self.dtype is None else in_precision(extraction, self.dtype)

    def _widened(self, extraction: Extraction) -> Extraction:
        return extraction if self.dtype is None else in_precision(extraction, torch.float32)


def in_precision(extraction: Extraction, dtype: torch.dtype) -> Extraction:
    """The same extraction with features of another dtype; boxes and scores stay as they are."""
    maps = extraction.features
    levels = tuple(level.to(dtype) for level in maps.levels)
    return replace(extraction, features=FeatureMaps(levels, maps.strides, maps.image_sizes))
