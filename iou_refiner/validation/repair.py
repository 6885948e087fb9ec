"""Repaired copies of results: what surely can be put right is, with a reason for each record; the rest stays."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.checks import shown
from iou_refiner.coco import GroundTruth, Results, xyxy_to_xywh
from iou_refiner.coco.data import FloatArray
from iou_refiner.coco.opening import FormatError, Problem, opened
from iou_refiner.coco.read import decode, iter_results
from iou_refiner.coco.stream import windows
from iou_refiner.coco.write import stream_to
from iou_refiner.validation.annotation_checks import repeats
from iou_refiner.validation.box_formats import look_xyxy, sizes_of_images
from iou_refiner.validation.findings import ENOUGH

_AT_ONCE = 1 << 15  # records decoded together
_EXACT = 2**53  # integers up to here are exact as floats


@dataclass(frozen=True)
class Repair:
    """One thing that was put right.

    Args:
        kind: what all repairs of its kind have in common.
        record: of the results, or entry of the annotation's section, counting from 1.
        image_id: where it could be read.
        reason: what stood there and what became of it.
    """

    kind: str
    record: int
    image_id: int | None
    reason: str


def format_repairs(repairs: Sequence[Repair], max_examples: int = 5) -> str:
    """The repairs as text, by kind, the first few of each in full; a line says how many there are more."""
    lines = []
    for kind, count in Counter(repair.kind for repair in repairs).items():
        lines.append(f"repaired x{count:,}: {kind}")
        some = [repair for repair in repairs if repair.kind == kind][:max_examples]
        lines += [f"    record {r.record:,}{_image(r.image_id)}: {r.reason}" for r in some]
        if some and len(some) < count:
            lines.append(f"    ... and {count - len(some):,} more (all of them with --json)")
    return "\n".join(lines)


def _image(image_id: int | None) -> str:
    return "" if image_id is None else f", image {image_id}"


def repair_results(path: Path, output: Path, ground_truth: GroundTruth | None = None) -> list[Repair]:
    """Write a copy of a results file in which what surely can be repaired is; records keep their order.

    Repaired are ids written as ``1.0``, keys written twice with one value, and boxes that surely are corners. Dropped
    are records whose box, score or iou is not finite, whose size is negative, and exact duplicates. A record with
    another fault stays as it is.

    Args:
        path: of the results.
        output: of the copy, written beside and renamed; compressed if it ends in .gz.
        ground_truth: for the sizes of images, if known.

    Raises:
        FormatError: the file is not one JSON list of records, which is not repaired here. Nothing is written then.
    """
    repairs: list[Repair] = []
    texts, numbers, sound = _repaired_records(path, repairs)
    rows = [row for row, good in enumerate(sound) if good]
    results = Results.concat(
        decode(b"[" + b",".join(texts[row] for row in rows[start : start + _AT_ONCE]) + b"]")
        for start in range(0, len(rows), _AT_ONCE)
    )
    boxes = results.bbox
    if len(boxes) >= ENOUGH and look_xyxy(boxes, sizes_of_images(ground_truth, results.image_id)):
        boxes = np.round(xyxy_to_xywh(boxes), 6)
        for at, (row, box, before) in enumerate(zip(rows, boxes.tolist(), results.bbox.tolist(), strict=True)):
            texts[row] = _encoded({**json.loads(texts[row]), "bbox": box})
            text = f"bbox {before} read as [x1, y1, x2, y2], written as {box}"
            repairs.append(Repair("boxes were corners", numbers[row], int(results.image_id[at]), text))
    dropped = _dropped(results, boxes)
    for row, (kind, more) in dropped.items():
        text = f"bbox {boxes[row].tolist()}{more}"
        repairs.append(Repair(kind, numbers[rows[row]], int(results.image_id[row]), text))
    gone = {rows[row] for row in dropped}
    with stream_to(output) as stream:
        stream.write(b"[\n" + b",\n".join(text for row, text in enumerate(texts) if row not in gone) + b"\n]\n")
    return repairs


def _dropped(results: Results, boxes: FloatArray) -> dict[int, tuple[str, str]]:
    """The rows to drop, each with a kind and a word more."""
    negative = (boxes[:, 2:] < 0).any(1)
    again = repeats([results.image_id, results.category_id, results.score, *boxes.T]) & ~negative
    return {
        **dict.fromkeys(np.flatnonzero(negative).tolist(), ("negative width or height, dropped", "")),
        **dict.fromkeys(np.flatnonzero(again).tolist(), ("exact duplicates, dropped", ", as an earlier record")),
    }


def _repaired_records(path: Path, repairs: list[Repair]) -> tuple[list[bytes], list[int], list[bool]]:
    """The text, the number and the soundness of every record, those that hold no number left out."""
    problems: list[Problem] = []
    for _ in iter_results(path, problems.append):
        pass
    faulty = {problem.number for problem in problems}
    for problem in problems:
        if problem.code == "E102":
            raise FormatError("E102", f"{path}: {problem} This is not repaired surely: nothing is written.")
    texts, numbers, sound = [], [], []
    with opened(path) as stream:
        number = 0
        for window in windows(stream, path):
            for start, end in zip(window.starts.tolist(), window.ends.tolist(), strict=True):
                number += 1
                text: bytes | None = window.data[start:end]
                if number in faulty and text is not None:
                    text = _repaired_record(text, number, repairs)
                if text is not None:
                    texts.append(text)
                    numbers.append(number)
                    sound.append(number not in faulty or _decodes(text))
    return texts, numbers, sound


def _decodes(text: bytes) -> bool:
    try:
        decode(b"[" + text + b"]")
    except (ValueError, RecursionError):
        return False
    return True


def _repaired_record(text: bytes, number: int, repairs: list[Repair]) -> bytes | None:
    """A faulty record put right as far as that is sure; None drops it."""
    record, repeated, differing = parse(text)
    if not isinstance(record, dict) or differing:
        return text
    image_id = as_integer(record.get("image_id"))
    values = [record.get("score", 0), record.get("iou", 0)]
    values += record["bbox"] if isinstance(record.get("bbox"), list) else []
    if wrong := [value for value in values if isinstance(value, float) and not math.isfinite(value)]:
        repairs.append(Repair("numbers that are not finite, dropped", number, image_id, f"holds {wrong[0]}"))
        return None
    made = [Repair("a key twice with one value, once dropped", number, image_id, f"key '{k}'") for k in repeated]
    for key in ("image_id", "category_id"):
        made += whole_number(record, key, number, image_id)
    try:
        changed = _encoded(record)
    except ValueError:  # what is not finite stands in a key of the user's own
        return text
    repairs += made
    return changed if made else text


def whole_number(entry: dict[str, Any], key: str, number: int, image_id: int | None) -> list[Repair]:
    """Write ``entry[key]`` as an integer where it is one written as ``1.0``."""
    value, whole = entry.get(key), as_integer(entry.get(key))
    if whole is None or not isinstance(value, float):
        return []
    entry[key] = whole
    return [Repair("whole numbers written as 1.0", number, image_id, f"{key} {value} written as {whole}")]


def as_integer(value: object) -> int | None:
    """The integer that a JSON value is, written as 1 or as 1.0; None for all else."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    return value if type(value) is int else None


def parse(text: bytes) -> tuple[Any, list[str], list[str]]:
    """JSON with the keys that stand twice in one object: those with one value, and those with different ones.

    Raises:
        ValueError, RecursionError: the text is not JSON.
    """
    repeated: list[str] = []
    differing: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            for key in sorted({key for key, count in Counter(key for key, _ in items).items() if count > 1}):
                same = all(repr(value) == repr(result[key]) for name, value in items if name == key)
                (repeated if same else differing).append(shown(key, 40))
        return result

    return json.loads(text, object_pairs_hook=pairs), repeated, differing


def _encoded(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
