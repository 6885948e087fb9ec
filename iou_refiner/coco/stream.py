"""COCO json cut into records.

A results file is one list of records; it is cut into windows of whole records, so a file of a million needs little
more memory than its columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iou_refiner.coco.data import IntArray
from iou_refiner.coco.opening import CURES, WINDOW, FormatError, Source, check_head, quoted

_WINDOW = WINDOW
_LONGEST_RECORD = 32 << 20  # bytes; a "record" beyond it is a file whose quotes or brackets do not close


@dataclass(frozen=True, eq=False)
class Window:
    """Whole records ``data[starts[i]:ends[i]]``, where ``data`` begins at byte ``offset`` of the file."""

    data: bytes
    starts: IntArray
    ends: IntArray
    offset: int


_ESCAPE = re.compile(rb"\\.", re.DOTALL)


def _outside_strings(data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The bytes of ``data``, escapes blanked, and which of them stand outside of strings."""
    codes = np.frombuffer(_ESCAPE.sub(b"__", data) if b"\\" in data else data, np.uint8)
    return codes, (np.cumsum(codes == ord('"'), dtype=np.uint8) & 1) == 0  # wraps at 256, which keeps the parity


def count_keys(data: bytes) -> int:
    """How many keys the records of a JSON list have, as they are written: a key that stands twice counts twice."""
    codes, outside = _outside_strings(data)
    folded = codes | 0x20
    step = ((folded == ord("{")) & outside).astype(np.int8) - ((folded == ord("}")) & outside)
    return int(np.count_nonzero((codes == ord(":")) & outside & (np.cumsum(step, dtype=np.int32) == 2)))


def _split(data: bytes) -> tuple[IntArray, IntArray, int | None]:
    """Where the records in ``data`` start and end, and where their list closes, if it does.

    ``data`` begins between two records. Only brackets outside strings count, so neither nested objects nor braces
    in strings mislead, and what stands inside a record need not be valid: the faults of one do not hide the next.
    """
    codes, outside = _outside_strings(data)
    folded = codes | 0x20  # turns [ into { and ] into }, and nothing else into either
    places = np.flatnonzero(((folded == ord("{")) | (folded == ord("}"))) & outside)
    opening = folded[places] == ord("{")
    depth = np.cumsum(np.where(opening, 1, -1))
    closed = np.flatnonzero(depth < 0)
    close = None
    if len(closed):
        close = int(places[closed[0]])
        places, opening, depth = places[: closed[0]], opening[: closed[0]], depth[: closed[0]]
    starts, ends = places[opening & (depth == 1)], places[~opening & (depth == 0)] + 1
    return starts[: len(ends)], ends, close


def windows(stream: Source, path: Path) -> Iterator[Window]:
    """All records of a results file, window by window; a FormatError says where the file stops being one list."""
    data = stream.read(_WINDOW)
    check_head(path, data, b"[")
    offset = data.index(b"[") + 1
    data = data[offset:]
    while True:
        starts, ends, close = _split(data)
        used = int(ends[-1]) if len(ends) else 0
        if len(ends):
            yield Window(data, starts, ends, offset)
        if close is not None:
            _check_tail(path, data[used:close], data[close:] + stream.read(_WINDOW), offset + used)
            return
        data, offset = data[used:], offset + used
        if len(data) > _LONGEST_RECORD:
            raise FormatError(
                "E102",
                f"{path}: what begins at byte {offset:,} is no record: no end within {_LONGEST_RECORD >> 20} MiB, "
                f"so a quote or bracket is missing. {CURES['E102']}",
            )
        block = stream.read(_WINDOW)
        if not block:
            raise FormatError(
                "E102",
                f"{path}: truncated: the list does not close; the last whole record ends at byte {offset:,}. "
                "Copy or write the file again.",
            )
        data += block


def _check_tail(path: Path, before: bytes, after: bytes, offset: int) -> None:
    if before.strip():
        stray = f"{quoted(before.strip())} before the list's closing bracket (after byte {offset:,})"
    elif after[:1] == b"}":
        stray = "a brace where the list should close with a bracket"
    elif after[1:].strip():
        stray = f"{quoted(after[1:].strip())} after the list's closing bracket"
    else:
        return
    raise FormatError("E102", f"{path}: expected only records in one list, found {stray}. {CURES['E102']}")
