"""One entry of a feature cache: an extraction in a safetensors file, which says what it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from iou_refiner.checks import DataError
from iou_refiner.detector.features import Extraction
from iou_refiner.files import write_whole
from iou_refiner.structures import Detections, FeatureMaps, ImageTransform

_CURE = "Remove that file; it is extracted anew where it is next needed."


def write_entry(path: Path, extraction: Extraction, dtype: torch.dtype, key: str, image: Path) -> None:
    """Write an extraction whole.

    Args:
        path: of the entry.
        extraction: what to write.
        dtype: of the features in the file.
        key: what the entry is made of.
        image: the file the extraction was made from.
    """
    candidates, transform = extraction.candidates, extraction.transform
    tensors = {f"level{i}": level.to(dtype) for i, level in enumerate(extraction.features.levels)}
    tensors |= {"boxes": candidates.boxes, "scores": candidates.scores, "labels": candidates.labels.int()}
    about = {
        "key": key,
        "image": str(image),
        "content": extraction.content,
        "undecided": extraction.undecided,
        "strides": extraction.features.strides,
        "network_size": extraction.features.image_sizes[0],
        "image_size": transform.image_size,
        "scale": transform.scale,
        "offset": transform.offset,
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(tensors, {"about": json.dumps(about)}), tidy=False)


def read_entry(path: Path, image_id: int, key: str) -> Extraction:
    """Read an entry; features in float32.

    Raises:
        DataError: it is damaged, or not made of what ``key`` says.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if about["key"] == key:
            return _extraction(image_id, about, tensors)
    except Exception as error:  # a damaged file has many ways to fail
        raise DataError(
            f"Image {image_id} cannot be read from the feature cache: {path} is damaged ({error}). {_CURE}"
        ) from None
    raise DataError(f"{path} is not of image {image_id}, of its view, or of this detector, as its name says. {_CURE}")


def is_outdated(path: Path, image: Path, content: str) -> bool:
    """Whether an entry is of this image file, which holds something else by now."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        return bool(about["image"] == str(image) and about["content"] != content)
    except Exception:  # what cannot be read is not known to be outdated
        return False


def _extraction(image_id: int, about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Extraction:
    levels = tuple(tensors[f"level{index}"].float() for index in range(len(about["strides"])))
    features = FeatureMaps(levels, tuple(about["strides"]), (tuple(about["network_size"]),))
    candidates = Detections(tensors["boxes"], tensors["scores"], tensors["labels"].long())
    transform = ImageTransform(tuple(about["image_size"]), tuple(about["scale"]), tuple(about["offset"]))
    return Extraction(image_id, features, candidates, transform, about["content"], about["undecided"])
