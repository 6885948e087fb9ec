"""COCO data as columns: detections, annotated images, and what converts and groups them. No file is touched here.

Boxes are ``(x, y, width, height)`` in pixels of the original image: with its neighbours that read and write COCO json,
the only place of the package where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ID_LIMITS = (-(2**63), 2**63 - 1)
Id = Annotated[int, msgspec.Meta(ge=ID_LIMITS[0], le=ID_LIMITS[1])]
Box = tuple[float, float, float, float]


def group_rows(ids: IntArray) -> dict[int, IntArray]:
    """Row indices of each id, ascending in both: (n,) int64 to arrays that together hold 0 to n - 1. One sort."""
    order = np.argsort(ids, kind="stable")
    steps = np.flatnonzero(np.diff(ids[order])) + 1
    groups = np.split(order, steps) if len(ids) else []
    return {int(ids[rows[0]]): rows for rows in groups}


def spread_rows(count: int, most: int) -> list[int]:
    """At most ``most`` of the rows 0 to ``count`` - 1, ascending, spread over all of them."""
    rows: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
    return rows


def xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """(n, 4) rows ``(x, y, width, height)`` to rows ``(x1, y1, x2, y2)``, a new array."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xyxy_to_xywh(boxes: FloatArray) -> FloatArray:
    """(n, 4) rows ``(x1, y1, x2, y2)`` to rows ``(x, y, width, height)``, a new array."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


@dataclass(frozen=True, eq=False)
class Results:
    """Saved detections as columns, one row per record.

    Args:
        image_id: (n,) int64, ids of the ground truth's images.
        category_id: (n,) int64, ids of the ground truth's categories.
        bbox: (n, 4) float64 xywh, pixels of the original image.
        score: (n,) float64.
        iou: (n,) float64 predicted IoU, or None while nobody has predicted it.
        extra: the other keys of each record (segmentation among them), n dicts of JSON values, or None where no
            record has any. Rows selected from one another share them: treat them as read-only.

    Raises:
        ValueError: a column has the wrong length.
        TypeError: a column has the wrong dtype.
    """

    image_id: IntArray
    category_id: IntArray
    bbox: FloatArray
    score: FloatArray
    iou: FloatArray | None = None
    extra: tuple[dict[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        rows = len(self.image_id)
        _check_column("image_id", self.image_id, (rows,), np.int64)
        _check_column("category_id", self.category_id, (rows,), np.int64)
        _check_column("bbox", self.bbox, (rows, 4), np.float64)
        _check_column("score", self.score, (rows,), np.float64)
        if self.iou is not None:
            _check_column("iou", self.iou, (rows,), np.float64)
        if self.extra is not None and len(self.extra) != rows:
            raise ValueError(f"`extra` must hold one dict per record, {rows}, got {len(self.extra)}.")

    def __len__(self) -> int:
        """Number of records."""
        return len(self.image_id)

    def __getitem__(self, rows: IntArray | NDArray[np.bool_] | slice) -> Results:
        """The rows that an index array, a boolean mask or a slice selects, in its order."""
        iou = None if self.iou is None else self.iou[rows]
        extra = None
        if self.extra is not None:
            extra = tuple(self.extra[row] for row in np.arange(len(self))[rows].tolist())
        return Results(self.image_id[rows], self.category_id[rows], self.bbox[rows], self.score[rows], iou, extra)

    def by_image(self) -> dict[int, IntArray]:
        """The rows of each image that has any, in file order."""
        return group_rows(self.image_id)

    @classmethod
    def concat(cls, parts: Iterable[Results]) -> Results:
        """The rows of all parts, one after the other; no part gives empty results.

        Raises:
            ValueError: some parts have `iou`, others do not.
        """
        parts = [part for part in parts if len(part)]
        if not parts:
            empty = np.empty(0, np.int64)
            return cls(empty, empty, np.empty((0, 4)), np.empty(0))
        ious = [part.iou for part in parts if part.iou is not None]
        if ious and len(ious) != len(parts):
            raise ValueError(f"`iou` must be in all parts or in none, got it in {len(ious)} of {len(parts)}.")
        extra = None
        if any(part.extra is not None for part in parts):
            extra = tuple(chain.from_iterable(part.extra or tuple({} for _ in range(len(part))) for part in parts))
        return cls(
            np.concatenate([part.image_id for part in parts]),
            np.concatenate([part.category_id for part in parts]),
            np.concatenate([part.bbox for part in parts]),
            np.concatenate([part.score for part in parts]),
            np.concatenate(ious) if ious else None,
            extra,
        )


def _check_column(name: str, values: NDArray[Any], shape: tuple[int, ...], dtype: type[np.generic]) -> None:
    if values.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape} to match `image_id`, got {values.shape}.")
    if values.dtype != dtype:
        raise TypeError(f"`{name}` must be {dtype.__name__}, got {values.dtype}. Convert with .astype().")


@dataclass(frozen=True)
class Image:
    """An image of the ground truth; sizes in pixels."""

    id: Id
    file_name: str
    width: Id  # of 64 bits as ids are
    height: Id


@dataclass(frozen=True)
class Category:
    """A category of the ground truth."""

    id: Id
    name: str


class Annotation(msgspec.Struct, gc=False):
    """An annotation as it stands in the file; keys not named here (segmentation, keypoints) are skipped unread."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Box
    area: float | None = None
    iscrowd: int | None = None
    ignore: int | bool | None = None


class ImagesFile(msgspec.Struct):
    """What a file says of its images; its annotations, if any, are skipped unread."""

    images: list[Image]
    categories: list[Category]


class GroundTruthFile(msgspec.Struct):
    """A ground truth file as it stands; what :class:`GroundTruth` is made of and what ``validate`` looks at."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Annotated images as columns, one row per annotation.

    Args:
        images: in file order.
        categories: in file order.
        id: (n,) int64, annotation ids as they stand in the file.
        image_id: (n,) int64.
        category_id: (n,) int64.
        bbox: (n, 4) float64 xywh, pixels of the image.
        area: (n,) float64 square pixels; that of the bbox where the file gives none.
        iscrowd: (n,) bool; False where the file does not say.
    """

    images: tuple[Image, ...]
    categories: tuple[Category, ...]
    id: IntArray
    image_id: IntArray
    category_id: IntArray
    bbox: FloatArray
    area: FloatArray
    iscrowd: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of annotations."""
        return len(self.id)

    def by_image(self) -> dict[int, IntArray]:
        """The rows of every image, in file order; an image without annotations has an empty array."""
        rows = group_rows(self.image_id)
        return {image.id: rows.get(image.id, np.empty(0, np.int64)) for image in self.images}

    def only(self, images: Iterable[int]) -> GroundTruth:
        """The same of some images, by id; their order stays."""
        wanted = set(images)
        rows = np.isin(self.image_id, list(wanted))
        columns = {
            name: getattr(self, name)[rows] for name in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        }
        return replace(self, images=tuple(image for image in self.images if image.id in wanted), **columns)

    def to_coco_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The dict that pycocotools indexes, all of it fresh, as pycocotools writes into what it is given.

        Annotations are numbered anew from 1: pycocotools takes a matched id 0 for no match, and loses all but one
        of the annotations that share an id.
        """
        rows = zip(self.image_id.tolist(), self.category_id.tolist(), self.bbox.tolist(), strict=True)
        shape = zip(self.area.tolist(), self.iscrowd.astype(int).tolist(), strict=True)
        annotations = [
            {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": crowd}
            for number, ((image, category, bbox), (area, crowd)) in enumerate(zip(rows, shape, strict=True), 1)
        ]
        return {
            "images": [msgspec.to_builtins(image) for image in self.images],
            "annotations": annotations,
            "categories": [msgspec.to_builtins(category) for category in self.categories],
        }
