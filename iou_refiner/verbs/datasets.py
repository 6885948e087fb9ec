"""A torch Dataset of images and targets, written out as a COCO data set.

All that reads images (the cache, many processes, a training that is resumed) knows them by their file, so a Dataset is
written once, as PNG, which keeps every 8-bit pixel. Where that is too much disk, annotate its files in COCO json.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import DataError, require
from iou_refiner.coco import Category, GroundTruth, Image, xyxy_to_xywh
from iou_refiner.files import write_whole
from iou_refiner.progress import Progress, no_progress

_ANNOTATION = "annotation.json"


def write_dataset(
    dataset: Any,
    folder: Path,
    *,
    category_ids: Mapping[int, int] | None = None,
    progress: Progress = no_progress,
) -> GroundTruth:
    """Write the images of a Dataset as PNG, with their annotation, into a folder.

    Args:
        dataset: has ``len`` and items ``(image, target)``. Images: PIL, (H, W, 3) uint8 arrays, or (3, H, W) tensors,
            uint8 or floats in [0, 1]. Targets: torchvision's dict of ``boxes`` (N, 4) xyxy pixels and ``labels`` (N,),
            perhaps ``iscrowd``, ``area``, ``image_id``; or the list of COCO annotations of ``CocoDetection``.
        folder: made if missing. Files of the same names are replaced.
        category_ids: of the detector, whose labels a dict's are; None where labels are category ids.
        progress: called after each image.

    Returns:
        The annotation. Image ids are those of the targets where all have one, else positions counted from 1.

    Raises:
        TypeError: it has no length, or an item is no image with its target. DataError: an item cannot be what it should
            be (normalised pixels, boxes in shares of the image); it is named by its position.
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"A Dataset must have a length, and {type(dataset).__name__} has none: give one with `__len__`."
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, objects = [], []
    for index in range(len(dataset)):
        try:
            picture, target = dataset[index]
        except (TypeError, ValueError) as error:
            raise TypeError(f"Item {index} of the Dataset is no pair of image and target ({error}).") from None
        rgb = _pixels(picture, index)
        name = f"images/{index + 1:08d}.png"
        _write_png(folder / name, rgb)
        own_id, rows = _objects(target, index, rgb.shape[:2], category_ids)
        images.append((own_id, name, rgb.shape[1], rgb.shape[0]))
        objects.append(rows)
        progress("writing the Dataset", index + 1, len(dataset))
    truth = _ground_truth(images, objects)
    write_whole(folder / _ANNOTATION, json.dumps(truth.to_coco_dict()).encode())
    return truth


def _ground_truth(
    images: list[tuple[int | None, str, int, int]], objects: list[dict[str, NDArray[Any]]]
) -> GroundTruth:
    own = [entry[0] for entry in images if entry[0] is not None]
    if len(own) == len(images) and len(set(own)) < len(own):
        raise DataError("Two items of the Dataset have the same `image_id`. Give each its own, or leave them out.")
    ids = own if len(own) == len(images) else list(range(1, len(images) + 1))
    columns = {name: np.concatenate([rows[name] for rows in objects] or [np.empty(0)]) for name in _COLUMNS}
    labels = columns["category_id"].astype(np.int64)
    return GroundTruth(
        images=tuple(Image(number, *entry[1:]) for number, entry in zip(ids, images, strict=True)),
        categories=tuple(Category(int(label), str(label)) for label in np.unique(labels)),
        id=np.arange(1, len(labels) + 1),
        image_id=np.repeat(np.array(ids, np.int64), [len(rows["area"]) for rows in objects]),
        category_id=labels,
        bbox=columns["bbox"].reshape(-1, 4),
        area=columns["area"],
        iscrowd=columns["iscrowd"].astype(np.bool_),
    )


_COLUMNS = ("bbox", "category_id", "area", "iscrowd")


def _objects(
    target: Any, index: int, size: tuple[int, int], category_ids: Mapping[int, int] | None
) -> tuple[int | None, dict[str, NDArray[Any]]]:
    """The image id of a target, if it has one, and the columns of its objects."""
    if isinstance(target, Mapping):
        if "boxes" not in target or "labels" not in target:
            raise TypeError(f"The target of item {index} must have `boxes` and `labels`; it has {', '.join(target)}.")
        boxes = _array(target["boxes"]).astype(np.float64).reshape(-1, 4)
        _check_boxes(target["boxes"], boxes, index, size)
        bbox = xyxy_to_xywh(boxes)
        labels = [int(label) for label in _array(target["labels"]).reshape(-1)]
        categories = [label if category_ids is None else category_ids.get(label, label) for label in labels]
        own_id = target.get("image_id")
        more = {name: target.get(name) for name in ("area", "iscrowd")}
    elif isinstance(target, (list, tuple)) and all(isinstance(entry, Mapping) for entry in target):
        bbox = np.array([entry["bbox"] for entry in target], np.float64).reshape(-1, 4)
        categories = [int(entry["category_id"]) for entry in target]
        own_id = target[0].get("image_id") if target else None
        more = {
            "area": [entry.get("area", float(np.prod(entry["bbox"][2:]))) for entry in target],
            "iscrowd": [entry.get("iscrowd", 0) for entry in target],
        }
    else:
        raise TypeError(
            f"The target of item {index} must be a dict of boxes and labels, or a list of COCO annotations, got "
            f"{type(target).__name__}."
        )
    if len(categories) != len(bbox):
        raise DataError(f"Item {index} of the Dataset has {len(bbox)} boxes and {len(categories)} labels.")
    area = bbox[:, 2] * bbox[:, 3] if more["area"] is None else _array(more["area"]).astype(np.float64).reshape(-1)
    iscrowd = np.zeros(len(bbox)) if more["iscrowd"] is None else _array(more["iscrowd"]).reshape(-1)
    rows = {"bbox": bbox.reshape(-1), "category_id": np.array(categories), "area": area, "iscrowd": iscrowd}
    return None if own_id is None else int(_array(own_id).reshape(-1)[0]), rows


def _check_boxes(given_boxes: Any, boxes: NDArray[np.float64], index: int, size: tuple[int, int]) -> None:
    layout = str(getattr(given_boxes, "format", "XYXY"))
    if not layout.endswith("XYXY"):
        raise DataError(f"The boxes of item {index} are {layout}. Convert them to XYXY (torchvision's ConvertBoxes).")
    if not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise DataError(
            f"The boxes of item {index} must be finite rows (x1, y1, x2, y2). Are they (x, y, width, height)?"
        )
    if len(boxes) and boxes.max() <= 1 and min(size) > 2:
        raise DataError(f"The boxes of item {index} look like shares of the image. Give them in pixels.")


def _pixels(picture: Any, index: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8."""
    if hasattr(picture, "convert"):
        return np.asarray(picture.convert("RGB"), np.uint8)
    pixels = _array(picture)
    if hasattr(picture, "detach") and pixels.ndim == 3:  # a tensor has its channels first
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, 2)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise TypeError(
            f"The image of item {index} must have three channels or one, got shape {_array(picture).shape}."
        )
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise TypeError(f"The image of item {index} is {pixels.dtype}. Give uint8, or floats in [0, 1].")
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise DataError(
            f"The pixels of item {index} go from {pixels.min():.3g} to {pixels.max():.3g}, and floats must lie in "
            "[0, 1]. Leave out the normalisation: detectors do that themselves."
        )
    return np.round(pixels * 255).astype(np.uint8)


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _write_png(path: Path, rgb: NDArray[np.uint8]) -> None:
    encoded = io.BytesIO()
    require("PIL.Image", extra="torchvision", purpose="Writing a Dataset").fromarray(rgb).save(
        encoded, "PNG", compress_level=1
    )
    write_whole(path, encoded.getvalue(), tidy=False)
