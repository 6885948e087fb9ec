"""The boxes of many images: from a dict by image, from lists of COCO records; and to columns for a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import DataError
from iou_refiner.coco import Results, xywh_to_xyxy, xyxy_to_xywh
from iou_refiner.connectors.image import to_numpy

_KEYS = ("image_id", "category_id", "bbox", "score")


def results_of_images(images: Mapping[int, Any]) -> Results:
    """The boxes of many images as COCO results.

    Args:
        images: by image id what :func:`iou_refiner.connectors.to_numpy` takes, boxes in pixels of the original image,
            labels being category ids.

    Raises:
        TypeError, ValueError: as :func:`iou_refiner.connectors.to_numpy`.
    """
    parts = []
    for image_id, image in images.items():
        columns = to_numpy(image)
        parts.append(
            Results(
                np.full(len(columns["labels"]), image_id, np.int64), columns["labels"],
                xyxy_to_xywh(columns["boxes"]), columns["scores"], columns.get("ious"),
            )
        )  # fmt: skip
    return Results.concat(parts)


def results_of_records(records: Sequence[Mapping[str, Any]]) -> Results:
    """COCO results from the list of records that ``json.load`` makes of a results file.

    Raises:
        DataError: a record lacks a key, or holds no number where one is due; it is named, counting from 1.
    """
    number = 0
    rows, extra = [], []
    try:
        for number, record in enumerate(records, 1):  # noqa: B007 - named in the message below
            x, y, width, height = map(float, record["bbox"])
            ids = (int(record["image_id"]), int(record["category_id"]))
            rows.append((*ids, (x, y, width, height), float(record["score"]), record.get("iou")))
            extra.append({key: value for key, value in record.items() if key not in (*_KEYS, "iou")})
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"Record {number:,} counting from 1 must have {', '.join(_KEYS)} as COCO results do: "
            f"{type(error).__name__} {error}."
        ) from None
    ious = [row[4] for row in rows]
    if any(iou is None for iou in ious) and any(iou is not None for iou in ious):
        raise DataError("Some records have an `iou` and others have none. Give it to all, or to none.")
    return Results(
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.float64).reshape(-1, 4),
        np.array([row[3] for row in rows], np.float64),
        np.array(ious, np.float64) if rows and ious[0] is not None else None,
        tuple(extra) if any(extra) else None,
    )


def images_of_results(results: Results) -> dict[int, dict[str, NDArray[Any]]]:
    """By image id the boxes of each image that has any, as :func:`iou_refiner.connectors.to_numpy` gives them."""
    images = {}
    for image_id, rows in results.by_image().items():
        part = results[rows]
        columns: dict[str, NDArray[Any]] = {
            "boxes": xywh_to_xyxy(part.bbox), "scores": part.score, "labels": part.category_id,
        }  # fmt: skip
        images[image_id] = columns if part.iou is None else {**columns, "ious": part.iou}
    return images


def columns_of_results(results: Results) -> dict[str, NDArray[Any]]:
    """A column a key, a row a detection, ready for ``pandas.DataFrame``: ids, x, y, width, height, score, and iou."""
    columns: dict[str, NDArray[Any]] = {"image_id": results.image_id, "category_id": results.category_id}
    columns |= dict(zip(("x", "y", "width", "height"), results.bbox.T, strict=True))
    columns["score"] = results.score
    return columns if results.iou is None else {**columns, "iou": results.iou}
