"""Results whose ids are not those of the annotation: images known by their file's name, categories counted from 0.

Some trainers save the number in a file's name as ``image_id`` (or the name itself), and number their categories 0, 1,
2 ... in the order of the annotation. Such files match nothing, or what is worse the wrong thing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from iou_refiner.checks import DataError, check_choice, shown
from iou_refiner.coco import GroundTruth, Results, read_results
from iou_refiner.coco.data import IntArray
from iou_refiner.coco.opening import opened
from iou_refiner.connectors.data_set import results_of_records

IMAGE_IDS = ("annotation", "file_name")
CATEGORY_IDS = ("annotation", "from_0", "from_1")


def read_foreign_results(
    path: str | Path,
    ground_truth: GroundTruth,
    *,
    image_ids: str = "annotation",
    category_ids: str | Mapping[int, int] = "annotation",
) -> Results:
    """Read results whose ids are others than those of the annotation, and give them its ids.

    Args:
        path: a .json or .json.gz file.
        ground_truth: the annotation, of which images and categories are read.
        image_ids: what ``image_id`` is. "annotation": its ids. "file_name": the name of the image file, with or without
            folder and ending, or the number that the name is.
        category_ids: what ``category_id`` is. "annotation": its ids. "from_0", "from_1": the position of the category
            in the annotation, by ascending id. Or a dict from theirs to those of the annotation.

    Raises:
        DataError: a record names what is not there, or a name means two images.
        ValueError: no such choice.
    """
    check_choice("image_ids", image_ids, IMAGE_IDS)
    if image_ids == "file_name":
        results = results_of_records(_with_image_ids(_records(Path(path)), ground_truth, Path(path)))
    else:
        results = read_results(path)
    if isinstance(category_ids, str):
        check_choice("category_ids", category_ids, CATEGORY_IDS)
        if category_ids == "annotation":
            return results
        own = sorted(category.id for category in ground_truth.categories)
        category_ids = dict(enumerate(own, int(category_ids == "from_1")))
    mapped = _mapped(results.category_id, category_ids, Path(path))
    return Results(results.image_id, mapped, results.bbox, results.score, results.iou, results.extra)


def _records(path: Path) -> list[dict[str, Any]]:
    with opened(path) as stream:
        data = stream.read_all()
    try:
        records = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not whole JSON ({error}). Write it again.") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: must hold one list of records, as COCO results do.")
    return records


def _with_image_ids(records: list[dict[str, Any]], ground_truth: GroundTruth, path: Path) -> list[dict[str, Any]]:
    ids_of = _ids_by_name(ground_truth)
    known = []
    for number, record in enumerate(records, 1):
        name = str(record.get("image_id"))
        ids = ids_of.get(name, set())
        if len(ids) != 1:
            what = "is the name of no image" if not ids else f"is the name of {len(ids)} images"
            raise DataError(
                f"{path}: record {number:,} counting from 1: image_id {shown(name)!r} {what} in the annotation. "
                "Leave out `image_ids` (--image-ids) if these are ids of the annotation."
            )
        known.append({**record, "image_id": next(iter(ids))})
    return known


def _ids_by_name(ground_truth: GroundTruth) -> dict[str, set[int]]:
    """The images that a text may mean: by path, name, stem, or the number that the stem is."""
    ids_of: dict[str, set[int]] = {}
    for image in ground_truth.images:
        name = PurePosixPath(image.file_name)
        names = {image.file_name, name.name, name.stem}
        if name.stem.isascii() and name.stem.isdigit():
            names.add(str(int(name.stem)))
        for text in names:
            ids_of.setdefault(text, set()).add(image.id)
    return ids_of


def _mapped(ids: IntArray, ids_of: Mapping[int, int], path: Path) -> IntArray:
    unique, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(number) for number in unique if int(number) not in ids_of]
    if unknown:
        some = ", ".join(map(str, unknown[:5]))
        raise DataError(
            f"{path}: no category stands for category_id {some}: `category_ids` (--category-ids) knows "
            f"{min(ids_of)} to {max(ids_of)}. Is it the annotation these results were made for?"
        )
    return np.array([ids_of[int(number)] for number in unique], np.int64)[inverse]
