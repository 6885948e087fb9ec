"""What is wrong with a record of a results file that does not decode."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from iou_refiner.checks import shown
from iou_refiner.coco.data import ID_LIMITS


def faults_of(text: bytes) -> tuple[int | None, list[tuple[str, str]]]:
    """The image id of a record that did not decode, and all that is wrong with it as (code, text)."""
    literals: list[str] = []  # what JSON does not know and Python's reader does
    repeated: list[str] = []  # keys of the object read last, which is the record itself

    def constant(literal: str) -> float:
        literals.append(literal)
        return float(literal)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated[:] = [key for key, count in Counter(key for key, _ in items).items() if count > 1]
        return dict(items)

    try:
        record = json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except RecursionError:
        return None, [("E102", "is nested too deeply to be read.")]
    except ValueError as error:
        return None, [("E102", f"is not JSON ({error}).")]
    if not isinstance(record, dict):
        return None, [("E202", f"is {_kind(record)}, expected an object.")]
    faults = [*_id_faults(record), *_box_faults(record), *_number_faults(record)]
    faults += [("E104", f"key '{shown(key, 40)}' stands more than once.") for key in repeated]
    if literals:
        faults = [fault for fault in faults if fault[0] != "E204"]
        faults.append(("E103", f"holds the literal {', '.join(sorted(set(literals)))}, which JSON does not know."))
    faults = faults or list(_other_faults(record))
    image_id = record.get("image_id")
    return image_id if _is_id(image_id) else None, faults


def _is_id(value: object) -> bool:
    return type(value) is int and ID_LIMITS[0] <= value <= ID_LIMITS[1]


def _is_finite(value: Any) -> bool:
    return bool(abs(value) <= sys.float_info.max)


def _id_faults(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("image_id", "category_id"):
        if key not in record:
            yield "E201", f"has no {key}."
        elif not _is_id(record[key]):
            yield "E202", f"{key} is {_kind(record[key])}, expected an integer of 64 bits{_repairable(record[key])}."


def _box_faults(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    box = record.get("bbox")
    if "bbox" not in record:
        yield "E201", "has no bbox."
    elif not isinstance(box, list):
        yield "E203", f"bbox is {_kind(box)}, expected four numbers."
    elif len(box) != 4:
        yield "E203", f"bbox has {len(box)} values, expected four numbers."
    elif wrong := [value for value in box if type(value) not in (int, float)]:
        yield "E203", f"bbox holds {_kind(wrong[0])}, expected four numbers."
    elif not all(map(_is_finite, box)):
        yield "E204", f"bbox is not finite ({box})."


def _number_faults(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("score", "iou"):
        if key not in record:
            if key == "score":
                yield "E201", "has no score."
        elif type(record[key]) not in (int, float):
            yield "E202", f"{key} is {_kind(record[key])}, expected a number."
        elif not _is_finite(record[key]):
            yield "E204", f"{key} is not finite ({record[key]})."


def _other_faults(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What readers refuse in the keys of a user's own."""
    for key, value in record.items():
        if not _all_finite(value):
            yield "E204", f"key '{shown(key, 40)}' holds a number that no float holds."
        elif any(0xD800 <= ord(letter) < 0xE000 for letter in json.dumps({key: value}, ensure_ascii=False)):
            yield "E102", f"key '{shown(key, 40)}' holds half a surrogate pair, which is no text."


def _all_finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list):
        return all(map(_all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, str):
        return f"a string ({shown(json.dumps(value[:40], ensure_ascii=False))})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"the number {_number(value)}"


def _number(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 256:  # no line is made of all its digits
        return f"of {value.bit_length()} bits"
    return str(value)


def _repairable(value: object) -> str:
    whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
    return " (`validate --fix` writes it as one)" if whole else ""
