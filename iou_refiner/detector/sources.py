"""Where features and candidates come from: the live detector, or a cache on disk.

The features of a frozen detector never change: from a cache, training reads them over many epochs at the price of one
pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from iou_refiner.checks import DataError, check_choice
from iou_refiner.coco import Image
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.features import Extraction, extract_image
from iou_refiner.files import write_whole
from iou_refiner.structures import Detections, FeatureMaps, ImageTransform

#: Gives the features and candidates of an image of a data set.
FeatureSource = Callable[[Image], Extraction]


def feature_source(adapter: Adapter, folder: str | Path, cache: str | Path | None = None) -> FeatureSource:
    """The features of the images in ``folder``: from the live detector, or through the cache if one is named."""
    if cache is None:
        return partial(extract_image, adapter, folder)
    return partial(FeatureCache(cache, adapter).get, folder)


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
            existing = json.loads(label.read_text())
            if existing != identity:
                differs = ", ".join(key for key in identity if existing.get(key) != identity[key])
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
        """The extraction of an image, from the cache, or from the detector into the cache."""
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
        candidates = Detections(tensors["boxes"], tensors["scores"], tensors["labels"].long())
        transform = ImageTransform(tuple(about["image_size"]), tuple(about["scale"]), tuple(about["offset"]))
        return Extraction(image_id, features, candidates, transform)

    def _path(self, image_id: int, view: int) -> Path:
        return self.folder / (f"{image_id}-{view}.safetensors" if view else f"{image_id}.safetensors")

    def _write(self, extraction: Extraction, view: int) -> None:
        candidates, transform = extraction.candidates, extraction.transform
        tensors = {f"level{i}": level.to(self.dtype) for i, level in enumerate(extraction.features.levels)}
        tensors |= {"boxes": candidates.boxes, "scores": candidates.scores, "labels": candidates.labels.int()}
        about = {
            "strides": extraction.features.strides,
            "network_size": extraction.features.image_sizes[0],
            "image_size": transform.image_size,
            "scale": transform.scale,
            "offset": transform.offset,
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
