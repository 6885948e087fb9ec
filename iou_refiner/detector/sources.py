"""Where features and candidates come from: the live detector, or a cache on disk.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError, check_choice
from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.entries import is_outdated, read_entry, write_entry
from iou_refiner.detector.features import Extraction, extract_image
from iou_refiner.detector.images import ImageFolder
from iou_refiner.detector.views import View
from iou_refiner.files import sweep, write_whole

#: Gives the features and candidates of an image of a data set.
FeatureSource = Callable[[Image], Extraction]

_FORMAT = 3
_ENTRY = re.compile(r"(-?\d+)-(\d+)-[0-9a-f]+\.safetensors")


def feature_source(
    adapter: Adapter, folder: str | Path, cache: str | Path | None = None
) -> LiveFeatures | CachedFeatures:
    """The features of the images in ``folder``: from the live detector, or through the cache if one is named."""
    return LiveFeatures(adapter, folder) if cache is None else FeatureCache(cache, adapter).of(folder)


class LiveFeatures:
    """A :data:`FeatureSource`: the live detector on the images of a folder."""

    def __init__(self, adapter: Adapter, images: str | Path):
        self.adapter, self.images = adapter, ImageFolder(images)
        self._noticed = _Noticed()

    def __call__(self, image: Image) -> Extraction:
        """Run the detector on an image."""
        extraction = extract_image(self.adapter, self.images, image)
        self._noticed.add(extraction)
        return extraction

    def notes(self) -> list[str]:
        """What the user should know of the images since this was last called, a sentence each."""
        return self._noticed.notes()


class FeatureCache:
    """Extractions on disk: one safetensors file per view of an image, written beside and renamed, so that a run may
    stop anywhere, and several runs may fill one cache.

    Args:
        folder: where; made if missing.
        adapter: the detector the extractions come from. A cache of another detector is refused.
        dtype: ``"float16"`` (half the size; rounds features by 5e-4 of their value) or ``"float32"``.

    Raises:
        DataError: the folder holds the cache of another detector or dtype, or one that cannot be read.
    """

    def __init__(self, folder: str | Path, adapter: Adapter, *, dtype: str = "float16"):
        check_choice("dtype", dtype, ["float16", "float32"])
        self.folder, self.adapter = Path(folder), adapter
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
        self._noticed = _Noticed()

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
        todo = self.missing(images, view=view)
        for index, image in enumerate(todo):
            extraction = extract_image(self.adapter, self.images, image, view=view)
            if index == 0:
                self._check_room(extraction.nbytes(self.cache.dtype) * len(todo))
            self._write(image, view, extraction)
            yield extraction

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


class _Noticed:
    """What was noticed of images, until it is told."""

    def __init__(self) -> None:
        self.stale = 0
        self._undecided: set[int] = set()
        self._told: set[int] = set()

    def add(self, extraction: Extraction) -> None:
        if extraction.undecided and extraction.image_id not in self._told:
            self._undecided.add(extraction.image_id)

    def notes(self) -> list[str]:
        told = []
        if self.stale == 1:
            told.append("1 entry of the cache was of another image and was extracted anew.")
        elif self.stale:
            told.append(f"{self.stale:,} entries of the cache were of other images and were extracted anew.")
        if self._undecided:
            told.append(
                "EXIF orientation is not applied, as in COCO, where the annotation's size fits either way: "
                f"{len(self._undecided):,} of the images (first: {min(self._undecided)})."
            )
        self._told |= self._undecided
        self.stale, self._undecided = 0, set()
        return told
