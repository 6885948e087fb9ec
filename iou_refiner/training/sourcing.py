"""Where a training takes its features from: the live detector or a cache, which is then filled.

A cache is written once and read in every epoch. It pays where that is quicker than the detector in every epoch: with a
detector on a CPU nearly always, with one on a GPU hardly ever, where reading 40 MB takes longer than computing them. So
both are measured on the first images. The features of the two are the same to the bit, and so is the head.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from iou_refiner.coco import GroundTruth, Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.cache import CachedFeatures, FeatureCache
from iou_refiner.detector.entries import read_entry, write_entry
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.live import LiveFeatures
from iou_refiner.detector.loading import Loading
from iou_refiner.detector.sources import MemoryFeatures, ViewSource
from iou_refiner.parallel.ranks import current
from iou_refiner.progress import Progress

# Images that times are taken on, after one that warms the detector up.
_TIMED_IMAGES = 3
# Share of a disk's free space that a cache may take, and of the memory that files read before are found in again.
_OF_DISK, _OF_MEMORY = 0.95, 0.5


@dataclass(frozen=True)
class Part:
    """Images to take features of.

    Args:
        truth: their annotation.
        folder: where they are.
        views: of each image.
        passes: how often all of them are read.
    """

    truth: GroundTruth
    folder: Path
    views: int
    passes: int

    @property
    def items(self) -> list[tuple[Image, int]]:
        """All views of all images."""
        return [(image, view) for view in range(self.views) for image in self.truth.images]


@dataclass(frozen=True)
class Costs:
    """What the features of one image cost one process.

    Args:
        detect: seconds to open the image and run the detector.
        write, read: seconds to write an entry of the cache, and to read it where the system still remembers it.
        nbytes: size of the entry.
    """

    detect: float
    write: float
    read: float
    nbytes: int

    def seconds(self, parts: Sequence[Part], *, cached: bool, memory: float) -> float:
        """Seconds that one process spends on features."""
        views = sum(part.views * len(part.truth.images) for part in parts)
        reads = sum(part.passes * part.views * len(part.truth.images) for part in parts)
        if not cached:
            return reads * self.detect
        # What does not fit into memory comes from the disk each time, which is taken to read as fast as it writes.
        again = self.read + (self.write if views * self.nbytes > _OF_MEMORY * memory else 0.0)
        return views * (self.detect + self.write) + reads * again


def training_sources(
    adapter: Adapter,
    parts: Sequence[Part],
    *,
    cache: str | Path,
    folder: Path,
    loading: Loading,
    note: Callable[[str], None],
    progress: Progress,
    check: Callable[[Extraction], None],
) -> list[ViewSource]:
    """The source of each part, ready to be read.

    Args:
        adapter: the detector.
        parts: what is to be read; the first is what is trained on.
        cache: "none"; a folder; or "auto", which is a cache in ``folder`` where one was begun or pays, else none.
        folder: of the training.
        loading: how images reach the detector.
        note: told what was decided, with sizes and times.
        progress: called after each extraction, in the phase "extracting".
        check: shown the first extraction, before the detector runs for long.

    Raises:
        DataError: the disk has no room for the cache that was asked for, said before it fills up; an image cannot be
            read; or as ``check``.
    """
    own = folder / "cache"
    if str(cache) == "auto" and not (own / "cache.json").exists():
        live = LiveFeatures(adapter, parts[0].folder, loading=loading)
        pays, text = _decide(live, parts, folder, check)
        note(text)
        cache = own if pays else "none"
    elif str(cache) == "auto":
        cache = own
    if str(cache) != "none":
        return _cached(FeatureCache(cache, adapter, loading=loading), parts, note, progress, check)
    sources = [LiveFeatures(adapter, part.folder, loading=loading, dtype=torch.float16) for part in parts]
    check(sources[0].load(parts[0].truth.images[0]))
    return [sources[0], *map(MemoryFeatures, sources[1:])]  # what is measured on is few, and read most often


def _decide(
    live: LiveFeatures, parts: Sequence[Part], folder: Path, check: Callable[[Extraction], None]
) -> tuple[bool, str]:
    """Whether a cache pays, as the first process measures it, and what to say about it."""
    costs = measured(live, parts[0].truth.images, folder, check)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else 0.0
    with_cache, without = (costs.seconds(parts, cached=cached, memory=memory) for cached in (True, False))
    size = costs.nbytes * sum(part.views * len(part.truth.images) for part in parts)
    free = shutil.disk_usage(folder).free
    pays = with_cache < without and size < _OF_DISK * free
    pays = bool(current().from_first(torch.tensor([float(pays)])).item())
    processes = current().count
    shared = f" on {processes} processes" if processes > 1 else ""
    decision = "A cache of features" if pays else "No cache of features, the detector runs in every epoch"
    text = (
        f"{decision}: an image takes {_time(costs.detect)} by the detector, {_time(costs.write)} to write and "
        f"{_time(costs.read)} to read; in all{shared} about {_time(with_cache / processes)} with a cache of "
        f"{_size(size)} ({_size(free)} are free), {_time(without / processes)} without."
    )
    return pays, text


def measured(live: LiveFeatures, images: Sequence[Image], folder: Path, check: Callable[[Extraction], None]) -> Costs:
    """The costs on the first images, the medians; entries are written to ``folder`` and removed."""
    few = list(images[: _TIMED_IMAGES + 1])
    check(live.load(few[0]))  # the first run of a detector takes longer
    detect, write, read, sizes = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="timing-", dir=folder) as place:
        for image in few[1:] or few:
            began = time.perf_counter()
            extraction = live.load(image)
            detected = time.perf_counter()
            path = Path(place) / f"{image.id}.safetensors"
            write_entry(path, extraction, torch.float16, "timing", path)
            written = time.perf_counter()
            read_entry(path, image.id, "timing")
            read.append(time.perf_counter() - written)
            write.append(written - detected)
            detect.append(detected - began)
            sizes.append(path.stat().st_size)
            path.unlink()
    middle = statistics.median
    return Costs(middle(detect), middle(write), middle(read), int(middle(sizes)))


def _cached(
    store: FeatureCache,
    parts: Sequence[Part],
    note: Callable[[str], None],
    progress: Progress,
    check: Callable[[Extraction], None],
) -> list[ViewSource]:
    """The cached features of the parts. What is missing is dealt out to the processes, each of which waits for all."""
    sources = [store.of(part.folder) for part in parts]
    todo = [_missing(source, part) for source, part in zip(sources, parts, strict=True)]
    counts = current().share([torch.tensor([sum(map(len, todo))])], current().count, torch.zeros(0, dtype=torch.int64))
    entries = int(torch.cat(counts).sum())
    done = 0
    for source, items in zip(sources, todo, strict=True):
        for extraction in source.fill_views(items, entries=entries if not done else 0):
            if not done:
                check(extraction)
                size = extraction.nbytes(store.dtype) * entries
                note(f"Features of {entries:,} views of images: about {size / 1e9:.2f} GB in {store.folder}")
            done += 1
            progress("extracting", done, sum(map(len, todo)))
    current().wait()
    for source in dict.fromkeys(sources):
        for text in source.notes():
            note(text)
    return list(sources)


def _missing(source: CachedFeatures, part: Part) -> list[tuple[Image, int]]:
    """Those of this process's views of images that the cache lacks."""
    return [(image, view) for image, view in current().mine(part.items) if source.missing([image], view=view)]


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e12:.1f} TB" if nbytes >= 1e12 else f"{nbytes / 1e9:.2f} GB"
