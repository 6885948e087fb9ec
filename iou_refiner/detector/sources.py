"""Where features and candidates come from: the live detector, a cache on disk, or memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.cache import CachedFeatures as CachedFeatures
from iou_refiner.detector.cache import FeatureCache as FeatureCache
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.live import LiveFeatures as LiveFeatures
from iou_refiner.detector.live import in_precision
from iou_refiner.detector.loading import Loading

#: Gives the features and candidates of an image of a data set.
FeatureSource = Callable[[Image], Extraction]


class ViewSource(Protocol):
    """Gives those of every :class:`View` of an image: what training reads from."""

    @property
    def adapter(self) -> Adapter:
        """The detector the extractions come from."""

    def missing(self, images: Iterable[Image], *, view: int = 0) -> list[Image]:
        """Those of ``images`` whose view of this number cannot be had from here."""

    def load(self, image: Image, *, view: int = 0) -> Extraction:
        """The extraction of one view; features in float32."""

    def stream(self, items: Iterable[tuple[Image, int]]) -> Iterator[Extraction]:
        """:meth:`load` for many views of images, ``(image, view)`` each, in their order, with work done ahead."""

    def notes(self) -> list[str]:
        """What the user should know of the images since this was last called, a sentence each."""


def feature_source(
    adapter: Adapter, folder: str | Path, cache: str | Path | None = None, *, loading: Loading | None = None
) -> LiveFeatures | CachedFeatures:
    """The features of the images in ``folder``: from the live detector, or through the cache if one is named."""
    if cache is None:
        return LiveFeatures(adapter, folder, loading=loading)
    return FeatureCache(cache, adapter, loading=loading).of(folder)


class MemoryFeatures:
    """A :class:`ViewSource` that remembers what it was asked for, up to a bound: for a few hundred images that are
    needed again and again.

    Args:
        source: what it asks.
        most_bytes: how much is remembered, first come, first kept; the rest is asked for each time. Features take as
            much as in a cache of float16, to which they are rounded whether remembered or not.
    """

    def __init__(self, source: ViewSource, most_bytes: int = 1 << 30):
        self.source, self._left = source, most_bytes
        self._remembered: dict[tuple[int, int], Extraction] = {}

    @property
    def adapter(self) -> Adapter:
        """The detector the extractions come from."""
        return self.source.adapter

    def missing(self, images: Iterable[Image], *, view: int = 0) -> list[Image]:
        """Those of ``images`` that cannot be had from here."""
        return self.source.missing(images, view=view)

    def load(self, image: Image, *, view: int = 0) -> Extraction:
        """The extraction of one view; features in float32."""
        return next(self.stream([(image, view)]))

    def __call__(self, image: Image) -> Extraction:
        """The extraction of an image."""
        return self.load(image)

    def stream(self, items: Iterable[tuple[Image, int]]) -> Iterator[Extraction]:
        """:meth:`load` for many views, in their order."""
        items = list(items)
        unknown = [(image, view) for image, view in items if (image.id, view) not in self._remembered]
        fresh = self.source.stream(unknown) if len(unknown) > 1 else map(self._from_source, unknown)
        new = {(image.id, view) for image, view in unknown}
        for image, view in items:
            if (image.id, view) in new:
                narrow = in_precision(next(fresh), torch.float16)
                self._remember((image.id, view), narrow)
            else:
                narrow = self._remembered[image.id, view]
            yield in_precision(narrow, torch.float32)

    def notes(self) -> list[str]:
        """What the user should know of the images since this was last called, a sentence each."""
        return self.source.notes()

    def _from_source(self, item: tuple[Image, int]) -> Extraction:
        return self.source.load(item[0], view=item[1])

    def _remember(self, key: tuple[int, int], extraction: Extraction) -> None:
        size = extraction.nbytes(torch.float16)
        if key not in self._remembered and size <= self._left:
            self._left -= size
            self._remembered[key] = extraction
