"""Extractions kept on disk.

The features of a frozen detector never change: from a cache, training reads them over many epochs at the price of one
pass.

An entry of the cache is named after what it was made of: the content of the image file, the annotation's width and
height, the view, the detector's weights and settings, and the precision. An entry that differs in any of them is not
read. The content is known by its hash, not by name, size and time: files unpacked from archives share their times, so
that two folders of uncompressed images could not be told apart, while copies of a data set, on this machine or another,
would be extracted again for nothing. It costs one reading of each image in a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError, check_choice
from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.ahead import ahead
from iou_refiner.detector.entries import is_outdated, read_entry, write_entry
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.images import ImageFolder
from iou_refiner.detector.live import LiveFeatures
from iou_refiner.detector.loading import Loading
from iou_refiner.detector.noticed import Noticed
from iou_refiner.detector.views import View
from iou_refiner.files import sweep, write_whole

_FORMAT = 3
_ENTRY = re.compile(r"(-?\d+)-(\d+)-[0-9a-f]+\.safetensors")


class FeatureCache:
    """Extractions on disk: one safetensors file per view of an image, written beside and renamed, so that a run may
    stop anywhere, and several runs may fill one cache.

    Args:
        folder: where; made if missing.
        adapter: the detector the extractions come from. A cache of another detector is refused.
        dtype: ``"float16"`` (half the size; rounds features by 5e-4 of their value) or ``"float32"``.
        loading: how images reach the detector, and entries the caller.

    Raises:
        DataError: the folder holds the cache of another detector or dtype, or one that cannot be read.
    """

    def __init__(self, folder: str | Path, adapter: Adapter, *, dtype: str = "float16", loading: Loading | None = None):
        check_choice("dtype", dtype, ["float16", "float32"])
        self.folder, self.adapter, self.loading = Path(folder), adapter, loading or Loading()
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.identity = {
            "detector": adapter.fingerprint(), "settings": adapter.settings(), "dtype": dtype, "format": _FORMAT,
        }  # fmt: skip
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"{self.folder} is a file, or lies in one, and cannot hold a feature cache.") from None
        label = self.folder / "cache.json"
        if os.path.lexists(label):
            self._check(label)
        else:
            write_whole(label, json.dumps(self.identity).encode())
        self._of: dict[Path, CachedFeatures] = {}
        self._current: set[str] = set()
        self._others: dict[tuple[int, int], list[str]] | None = None

    def of(self, images: str | Path) -> CachedFeatures:
        """The features of the images in a folder; the same object for the same folder."""
        folder = Path(images).resolve()
        return self._of.setdefault(folder, CachedFeatures(self, images))

    def is_current(self, path: Path) -> bool:
        """Whether an entry is there; it counts as used in this run from now on."""
        if not path.is_file():
            return False
        self._current.add(path.name)
        return True

    def others(self, image_id: int, view: int) -> list[Path]:
        """Entries of other images under the same id and view that nothing in this run has used; each is told once."""
        if self._others is None:
            sweep(self.folder, r".*\.safetensors")
            self._others = {}
            for name in sorted(os.listdir(self.folder)):
                if match := _ENTRY.fullmatch(name):
                    self._others.setdefault((int(match[1]), int(match[2])), []).append(name)
        names = self._others.pop((image_id, view), [])
        return [self.folder / name for name in names if name not in self._current]

    def _check(self, label: Path) -> None:
        cure = "Remove the folder, or name another for the cache."
        try:
            existing = json.loads(label.read_text()) if label.is_file() else None
        except (OSError, ValueError, RecursionError):
            existing = None
        if not isinstance(existing, dict):
            raise DataError(f"{label} is damaged, so nothing says which detector this feature cache is of. {cure}")
        if existing.get("format") != _FORMAT:
            raise DataError(
                f"{self.folder} is a feature cache of another version, and does not say which images it is of. {cure}"
            )
        differs = ", ".join(key for key in self.identity if existing.get(key) != self.identity[key])
        if differs:
            raise DataError(f"{self.folder} is a feature cache made with another {differs}. {cure}")


class CachedFeatures:
    """A :data:`FeatureSource`: the images of one folder, in a cache. Made by :meth:`FeatureCache.of`."""

    def __init__(self, cache: FeatureCache, images: str | Path):
        self.cache, self.images = cache, ImageFolder(images)
        self._live = LiveFeatures(cache.adapter, self.images, loading=cache.loading)
        self._noticed = Noticed()

    @property
    def adapter(self) -> Adapter:
        """The detector the extractions come from."""
        return self.cache.adapter

    def missing(self, images: Iterable[Image], *, view: int = 0) -> list[Image]:
        """Those of ``images`` whose :class:`View` of this number is not yet in the cache.

        Raises:
            DataError: the file of an image cannot be read.
        """
        return [image for image in images if not self.cache.is_current(self._entry(image, view)[0])]

    def fill(self, images: Iterable[Image], *, view: int = 0) -> Iterator[Extraction]:
        """Extract what is missing, image by image; yields each extraction as it is stored.

        Raises:
            DataError: an image cannot be read, or the disk has no room for what is missing (said before it fills up).
        """
        yield from self.fill_views([(image, view) for image in self.missing(images, view=view)])

    def fill_views(self, items: Sequence[tuple[Image, int]], *, entries: int = 0) -> Iterator[Extraction]:
        """Extract views of images, ``(image, view)`` each, that :meth:`missing` named.

        Args:
            items: the views.
            entries: how many entries the disk must have room for, where more is to come than these.

        Raises:
            DataError: as :meth:`fill`.
        """
        for index, extraction in enumerate(self._live.stream(items)):
            if index == 0:
                self._check_room(extraction.nbytes(self.cache.dtype) * max(entries, len(items)))
            self._write(*items[index], extraction)
            yield extraction

    def stream(self, items: Iterable[tuple[Image, int]]) -> Iterator[Extraction]:
        """:meth:`load` for many views of images, ``(image, view)`` each, read ahead in threads; in their order."""
        return ahead(lambda item: self.load(item[0], view=item[1]), items, self.cache.loading.workers)

    def load(self, image: Image, *, view: int = 0) -> Extraction:
        """One extraction; features in float32.

        Raises:
            DataError: it is not in the cache, or damaged.
        """
        path, key = self._entry(image, view)
        if not path.is_file():
            raise DataError(
                f"Image {image.id} as {self.images.path(image)} has it now is not in the feature cache "
                f"{self.cache.folder}. Fill it first with CachedFeatures.fill."
            )
        extraction = read_entry(path, image.id, key)
        self._noticed.add(extraction)
        return extraction

    def __call__(self, image: Image) -> Extraction:
        """The extraction of an image, from the cache, or from the detector into the cache."""
        for _ in self.fill([image]):
            pass
        return self.load(image)

    def notes(self) -> list[str]:
        """What the user should know of images and cache since this was last called, a sentence each."""
        return self._noticed.notes()

    def _entry(self, image: Image, view: int, content: str | None = None) -> tuple[Path, str]:
        """The file of an entry and its key, the hash of what it is made of."""
        content = content or self.images.content(image)
        window = View.of(image.id, (image.height, image.width), view)
        of: dict[str, Any] = {"content": content, "size": [image.width, image.height], "window": repr(window)}
        key = hashlib.sha256(json.dumps(self.cache.identity | of, sort_keys=True).encode()).hexdigest()
        return self.cache.folder / f"{image.id}-{view}-{key[:20]}.safetensors", key

    def _write(self, image: Image, view: int, extraction: Extraction) -> None:
        # By the content that was decoded: the file may have changed since it was looked for.
        path, key = self._entry(image, view, extraction.content)
        file = self.images.path(image).resolve()
        others = self.cache.others(image.id, view)
        write_entry(path, extraction, self.cache.dtype, key, file)
        self.cache.is_current(path)
        self._noticed.add(extraction)
        self._noticed.stale += bool(others)
        for other in others:
            if is_outdated(other, file, extraction.content):
                other.unlink(missing_ok=True)

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.cache.folder).free
        if needed > 0.95 * free:
            raise DataError(
                f"The feature cache needs about {needed / 1e9:.1f} GB more in {self.cache.folder}, where "
                f"{free / 1e9:.1f} GB are free. Name a larger disk, or use fewer images."
            )
