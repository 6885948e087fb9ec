"""Run a frozen detector over images once, and keep what it saw: feature maps and candidates.

:class:`Adapter` is the contract between a detector framework and the core. :class:`FeatureCache` keeps extractions on
disk, since what a frozen detector sees never changes: training reads them over many epochs at the price of one pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open

from iou_refiner._checks import DataError, check_choice, require
from iou_refiner._files import write_whole
from iou_refiner.coco import Image
from iou_refiner.data import Detections, FeatureMaps, Frame
from iou_refiner.views import View

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


@dataclass(frozen=True, eq=False)
class Extraction:
    """What a frozen detector saw in one image.

    Attributes:
        image_id: of the data set.
        features: one image of feature maps.
        candidates: boxes before suppression, network frame.
        frame: from the image file (or the view of it) to the network input.
    """

    image_id: int
    features: FeatureMaps
    candidates: Detections
    frame: Frame

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
    seen = View.of(image.id, (image.height, image.width), view)
    prepared, to_input = adapter.prepare(seen.pixels(open_image(folder, image)))
    features, (candidates,), (to_network,) = adapter.extract([prepared])
    return Extraction(image.id, features, candidates, to_input.then(to_network))


class FeatureCache:
    """Extractions on disk: one safetensors file per image, written beside and renamed, so a run may stop anywhere.

    Args:
        folder: where; made if missing.
        adapter: the detector the extractions come from. A cache of another detector is refused.
        dtype: ``"float16"`` (half the size; rounds features by 5e-4 of their value) or ``"float32"``.

    Raises:
        DataError: the folder holds the cache of another detector or dtype.
    """

    def __init__(self, folder: str | Path, adapter: Adapter, *, dtype: str = "float16"):
        check_choice("dtype", dtype, ["float16", "float32"])
        self.folder, self.adapter = Path(folder), adapter
        self.dtype: torch.dtype = getattr(torch, dtype)
        identity = {"detector": adapter.fingerprint(), "settings": adapter.settings(), "dtype": dtype, "format": 2}
        self.folder.mkdir(parents=True, exist_ok=True)
        label = self.folder / "cache.json"
        if label.exists():
            found = json.loads(label.read_text())
            if found != identity:
                differs = ", ".join(key for key in identity if found.get(key) != identity[key])
                raise DataError(
                    f"{self.folder} is a feature cache made with another {differs}. Name another folder, or remove it."
                )
        else:
            write_whole(label, json.dumps(identity).encode())

    def missing(self, images: Iterable[Image], *, view: int = 0) -> list[Image]:
        """Those of ``images`` whose :class:`View` of this number is not yet in the cache."""
        return [image for image in images if not self._path(image.id, view).exists()]

    def fill(self, folder: str | Path, images: Iterable[Image], *, view: int = 0) -> Iterator[Extraction]:
        """Extract what is missing, image by image; yields each extraction as it is stored.

        Raises:
            DataError: an image cannot be read, or the disk has no room for what is missing (said before it fills up).
        """
        todo = self.missing(images, view=view)
        for index, image in enumerate(todo):
            extraction = extract_image(self.adapter, folder, image, view=view)
            if index == 0:
                self._check_room(extraction.nbytes(self.dtype) * len(todo))
            self._write(extraction, view)
            yield extraction

    def get(self, folder: str | Path, image: Image) -> Extraction:
        """What the detector sees in an image, from the cache, or from the detector into the cache."""
        for _ in self.fill(folder, [image]):
            pass
        return self.load(image.id)

    def load(self, image_id: int, *, view: int = 0) -> Extraction:
        """One extraction; features in float32.

        Raises:
            DataError: it is not in the cache, or damaged.
        """
        path = self._path(image_id, view)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"Image {image_id} cannot be read from the feature cache ({error}).") from None
        levels = tuple(tensors[f"level{index}"].float() for index in range(len(about["strides"])))
        features = FeatureMaps(levels, tuple(about["strides"]), (tuple(about["network_size"]),))
        frame = Frame(tuple(about["image_size"]), tuple(about["scale"]), tuple(about["offset"]))
        return Extraction(
            image_id, features, Detections(tensors["boxes"], tensors["scores"], tensors["labels"].long()), frame
        )

    def _path(self, image_id: int, view: int) -> Path:
        return self.folder / (f"{image_id}-{view}.safetensors" if view else f"{image_id}.safetensors")

    def _write(self, extraction: Extraction, view: int) -> None:
        found, frame = extraction.candidates, extraction.frame
        tensors = {f"level{i}": level.to(self.dtype) for i, level in enumerate(extraction.features.levels)}
        tensors |= {"boxes": found.boxes, "scores": found.scores, "labels": found.labels.int()}
        about = {
            "strides": extraction.features.strides,
            "network_size": extraction.features.image_sizes[0],
            "image_size": frame.image_size,
            "scale": frame.scale,
            "offset": frame.offset,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(
            self._path(extraction.image_id, view), safetensors.torch.save(tensors, {"about": json.dumps(about)})
        )

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > 0.95 * free:
            raise DataError(
                f"The feature cache needs about {needed / 1e9:.1f} GB more in {self.folder}, where {free / 1e9:.1f} GB "
                "are free. Name a larger disk, or use fewer images."
            )
