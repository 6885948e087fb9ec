"""Repaired copies of annotations: what surely can be put right is, with a reason for each entry."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from iou_refiner.coco import xyxy_to_xywh
from iou_refiner.coco.ground_truth import keys_twice, object_error, read_whole
from iou_refiner.coco.opening import CURES, FormatError
from iou_refiner.coco.write import stream_to
from iou_refiner.validation.box_formats import look_xyxy
from iou_refiner.validation.findings import ENOUGH
from iou_refiner.validation.repair import Repair, as_integer, parse, whole_number

Entry = dict[str, Any]
_WHOLE = {
    "images": ("id", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "iscrowd"),
    "categories": ("id",),
}


def repair_annotation(path: Path, output: Path) -> list[Repair]:
    """Write a copy of an annotation in which what surely can be repaired is; other keys stay as they are.

    Repaired are whole numbers written as ``1.0``, boxes that surely are corners, a missing or infinite area, a missing
    iscrowd, and annotation ids that are 0 or occur twice. Dropped are annotations whose box is not finite or whose size
    is negative, and exact duplicates. An entry with another fault stays as it is.

    Args:
        path: of the annotation.
        output: of the copy, written beside and renamed; compressed if it ends in .gz.

    Raises:
        FormatError: the file is not one JSON object, a key stands twice with different values, or a number that is not
            finite stands where it cannot be dropped. Nothing is written then.
    """
    document, repairs = _document(path)
    for section, keys in _WHOLE.items():
        for number, entry in _entries(document, section):
            for key in keys:
                image_id = as_integer(entry.get("id" if section == "images" else "image_id"))
                repairs += whole_number(entry, key, number, image_id if section != "categories" else None)
    if isinstance(document.get("annotations"), list):
        _write_sizes(document, repairs)
        _fill(document, repairs)
        _number(document, repairs)
        _drop(document, repairs)
    try:
        text = json.dumps(document, allow_nan=False)
    except ValueError as error:
        what = "a number that is not finite stands in a key that is not repaired"
        raise FormatError("E103", f"{path}: {what}. {CURES['E103']} Nothing is written.") from error
    with stream_to(output) as stream:
        stream.write(text.encode() + b"\n")
    return repairs


def _document(path: Path) -> tuple[Entry, list[Repair]]:
    """What a file holds, and the keys in it that stood twice with one value."""
    data = read_whole(path)
    try:
        document, repeated, differing = parse(data)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError("E102", f"{path}: is not whole JSON ({error}). {CURES['E102']}") from error
    twice = differing or [key for key in repeated if key in _WHOLE]
    if twice:
        raise FormatError("E104", f"{path}: the key '{twice[0]}' stands twice. {CURES['E104']} Nothing is written.")
    try:
        places = list(keys_twice(data, _WHOLE)) if repeated else []
    except msgspec.MsgspecError as error:
        raise object_error(path, data, error) from error
    kind = "a key twice with one value, once dropped"
    return dict(document), [Repair(kind, entry, None, f"{section}: key '{key}'") for section, entry, key in places]


def _entries(document: Entry, section: str) -> list[tuple[int, Entry]]:
    """The objects of a section with their numbers from 1; what is none is left alone."""
    entries = document.get(section)
    listed = entries if isinstance(entries, list) else []
    return [(number, entry) for number, entry in enumerate(listed, 1) if isinstance(entry, dict)]


def _boxed(document: Entry) -> list[tuple[int, Entry]]:
    return [(number, entry) for number, entry in _entries(document, "annotations") if _is_box(entry.get("bbox"))]


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _write_sizes(document: Entry, repairs: list[Repair]) -> None:
    """Boxes that surely are corners become corner and size."""
    known = {as_integer(entry.get("id")): entry for _, entry in _entries(document, "images")}
    boxed = [(number, entry) for number, entry in _boxed(document) if all(map(_finite, entry["bbox"]))]
    if len(boxed) < ENOUGH:
        return
    images = [known.get(as_integer(entry.get("image_id")), {}) for _, entry in boxed]
    sides = [[image.get(key) for key in ("width", "height")] for image in images]
    sizes = np.array([pair if all(map(_finite, pair)) else [np.nan, np.nan] for pair in sides], np.float64)
    boxes = np.array([entry["bbox"] for _, entry in boxed], np.float64)
    if np.isnan(sizes).all() or not look_xyxy(boxes, sizes):
        return
    for (number, entry), box in zip(boxed, np.round(xyxy_to_xywh(boxes), 6).tolist(), strict=True):
        reason = f"bbox {entry['bbox']} read as [x1, y1, x2, y2], written as {box}"
        repairs.append(Repair("boxes were corners", number, as_integer(entry.get("image_id")), reason))
        entry["bbox"] = box


def _drop(document: Entry, repairs: list[Repair]) -> None:
    seen: set[tuple[Any, ...]] = set()

    def reason(entry: Entry) -> str | None:
        box = entry.get("bbox")
        if not isinstance(box, list) or not _is_box(box):
            return None
        if not all(map(_finite, box)):
            return "boxes that are not finite, dropped"
        if min(box[2:]) < 0:
            return "negative width or height, dropped"
        key = tuple(entry.get(name) for name in ("image_id", "category_id", "iscrowd"))
        if any(type(value) not in (int, type(None)) for value in key):
            return None
        again = (*key, *box) in seen
        seen.add((*key, *box))
        return "exact duplicates, dropped" if again else None

    dropped = _dropping(document, reason, repairs)
    document["annotations"] = [entry for at, entry in enumerate(document["annotations"], 1) if at not in dropped]


def _dropping(document: Entry, reason: Callable[[Entry], str | None], repairs: list[Repair]) -> set[int]:
    numbers = set()
    for number, entry in _entries(document, "annotations"):
        if kind := reason(entry):
            numbers.add(number)
            repairs.append(Repair(kind, number, as_integer(entry.get("image_id")), f"bbox {entry['bbox']}"))
    return numbers


def _fill(document: Entry, repairs: list[Repair]) -> None:
    """A missing iscrowd is 0, a missing area that of the box: as all readers of the format take them."""
    for number, entry in _boxed(document):
        image_id, area = as_integer(entry.get("image_id")), entry.get("area")
        if not all(map(_finite, entry["bbox"])) or min(entry["bbox"][2:]) < 0:
            continue  # about to be dropped
        if area is None or (isinstance(area, float) and not math.isfinite(area)):
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            repairs.append(Repair("area filled with that of the box", number, image_id, f"area {entry['area']}"))
        if entry.get("iscrowd") is None:
            entry["iscrowd"] = 0
            repairs.append(Repair("missing iscrowd filled with 0", number, image_id, "iscrowd 0"))


def _number(document: Entry, repairs: list[Repair]) -> None:
    """Ids that are 0 or taken become new ones beyond the largest."""
    entries = [(number, entry) for number, entry in _entries(document, "annotations") if type(entry.get("id")) is int]
    fresh = max((entry["id"] for _, entry in entries), default=0) + 1
    taken = {0}
    for number, entry in entries:
        if entry["id"] in taken:
            reason = f"id {entry['id']} written as {fresh}"
            repairs.append(Repair("ids that were 0 or taken", number, as_integer(entry.get("image_id")), reason))
            entry["id"], fresh = fresh, fresh + 1
        taken.add(entry["id"])
