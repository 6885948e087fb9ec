"""COCO json as it comes from disk: opening a file, naming what it is where it is not COCO, cutting it into records.

A results file is one list of records; it is cut into windows of whole records, so a file of a million needs little
more memory than its columns. A ground truth file is one object, and read whole.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from iou_refiner.checks import DataError
from iou_refiner.coco.data import IntArray

T = TypeVar("T")

_WINDOW = 4 << 20  # bytes read at a time
_LONGEST_RECORD = 32 << 20  # bytes; a "record" beyond it is a file whose quotes or brackets do not close

CURES = {
    "E102": "Repair the file, or write it again with a JSON library.",
    "E103": "JSON has no NaN or Infinity: drop the record, or repair what computed it.",
    "E201": "Every record needs image_id, category_id, bbox and score; iou is in all records or in none.",
    "E202": "Write ids as integers and scores as numbers, without quotes.",
    "E203": "Write bbox as [x, y, width, height] in pixels.",
    "E204": "Drop the record, or repair what computed it.",
}


class FormatError(DataError):
    """A file breaks the COCO format; ``code`` is the one under which ``validate`` lists the fault."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Problem:
    """One fault of one record.

    Args:
        code: the validation code, ``E102`` to ``E204``.
        number: of the record in its file, counting from 1.
        image_id: of the record, where it could be read.
        text: what came and what was expected.
    """

    code: str
    number: int
    image_id: int | None
    text: str

    def __str__(self) -> str:
        image = "" if self.image_id is None else f" (image {self.image_id})"
        return f"record {self.number:,} counting from 1{image}: {self.text}"


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of a .json or .json.gz file; whatever hinders reading them becomes a FormatError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except gzip.BadGzipFile as error:
        raise FormatError("E102", f"{path}: named .gz, but its content is not gzip ({error}). Rename it.") from error
    except (EOFError, zlib.error) as error:
        raise FormatError("E102", f"{path}: the gzip stream is broken or cut off ({error}). Copy it again.") from error
    except FileNotFoundError as error:
        raise FormatError("E102", f"{path}: no such file. Check the path.") from error
    except OSError as error:
        raise FormatError("E102", f"{path}: cannot be read ({error.strerror}). Check the path.") from error


_SIGNATURES = (
    (b"\x1f\x8b", "is gzip compressed. Rename it to end in .json.gz."),
    (b"\x28\xb5\x2f\xfd", "is zstd compressed, which is not read here. Decompress it with zstd -d."),
    (b"PK\x03\x04", "is a zip archive. Unpack it."),
    (b"\xef\xbb\xbf", "begins with a UTF-8 byte order mark, which JSON forbids. Save it as UTF-8 without BOM."),
    (b"\xff\xfe", "is UTF-16 text. Save it as UTF-8."),
    (b"\xfe\xff", "is UTF-16 text. Save it as UTF-8."),
)
_JSON_LINES = re.compile(rb"[^\n]*\}[ \t\r]*\n\s*\{")  # one object ends with its line, the next line begins another
_LIST_KEY = re.compile(rb'"(predictions|detections|results|annotations)"\s*:\s*\[')


def _check_head(path: Path, head: bytes, expected: bytes) -> None:
    """Raise a FormatError that names what the file is, unless its first character is ``[`` or ``{``, as expected."""
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            raise FormatError("E102", f"{path}: {what}")
    text = head.lstrip()
    first = text[:1]
    if not first:
        raise FormatError("E102", f"{path}: the file is empty. A file without detections holds [].")
    if first == expected:
        return
    if expected == b"{":
        raise FormatError(
            "E101",
            f"{path}: expected an object with images, annotations and categories, found {quoted(text)}. "
            "Give the ground truth file, not a results file.",
        )
    if first == b"{":
        raise _object_in_place_of_list(path, text)
    code = "E101" if first in b'"-0123456789tfn' else "E102"
    raise FormatError(code, f"{path}: expected a JSON list of records, found {quoted(text)}. {CURES['E102']}")


def _object_in_place_of_list(path: Path, text: bytes) -> FormatError:
    if _JSON_LINES.match(text):
        return FormatError("E102", f"{path}: holds one object per line (JSON lines). Join the lines into one list.")
    if b'"images"' in text and b'"file_name"' in text:
        cure = "It looks like a ground truth file: give the detector's results file here."
    elif key := _LIST_KEY.search(text):
        cure = f"Its key {key[1].decode()!r} holds a list: save that list alone."
    else:
        cure = "Save the list of records alone."
    return FormatError("E101", f"{path}: expected a list of records, found an object. {cure}")


def quoted(text: bytes) -> str:
    """The beginning of ``text``, for a message."""
    return repr(text[:20].decode("utf-8", "replace"))


@dataclass(frozen=True, eq=False)
class Window:
    """Whole records ``data[starts[i]:ends[i]]``, where ``data`` begins at byte ``offset`` of the file."""

    data: bytes
    starts: IntArray
    ends: IntArray
    offset: int


_ESCAPE = re.compile(rb"\\.", re.DOTALL)


def _split(data: bytes) -> tuple[IntArray, IntArray, int | None]:
    """Where the records in ``data`` start and end, and where their list closes, if it does.

    ``data`` begins between two records. Only brackets outside strings count, so neither nested objects nor braces
    in strings mislead, and what stands inside a record need not be valid: the faults of one do not hide the next.
    """
    codes = np.frombuffer(_ESCAPE.sub(b"__", data) if b"\\" in data else data, np.uint8)
    outside = (np.cumsum(codes == ord('"'), dtype=np.uint8) & 1) == 0  # wraps at 256, which keeps the parity
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


def windows(stream: BufferedIOBase, path: Path) -> Iterator[Window]:
    """All records of a results file, window by window; a FormatError says where the file stops being one list."""
    data = stream.read(_WINDOW)
    _check_head(path, data, b"[")
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


def read_object(path: Path, kind: type[T]) -> T:
    """The one JSON object of a ground truth file, as the msgspec type ``kind``; raises for the first fault found."""
    with opened(path) as stream:
        data = stream.read()
    _check_head(path, data[:_WINDOW], b"{")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _entry_error(path, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        offset = re.search(r"\(byte (\d+)\)", str(error))
        literal = re.match(rb"-?(NaN|Infinity)", data[int(offset[1]) :]) if offset else None
        if literal:
            text = f"holds the literal {literal[0].decode()} at byte {int(offset[1]):,}"  # type: ignore[index]
            raise FormatError("E103", f"{path}: {text}. {CURES['E103']}") from error
        raise FormatError("E102", f"{path}: is not whole JSON ({error}). {CURES['E102']}") from error


_PLACE = re.compile(r" - at `\$(?:\.(\w+)(?:\[(\d+)\])?(?:\.(\w+))?)?.*`$")


def _entry_error(path: Path, message: str) -> FormatError:
    """The decoder's own words, its path (``$.annotations[3].area``) turned into an entry counted from 1."""
    code = "E201" if "missing required" in message else "E203" if ".bbox" in message else "E202"
    place = _PLACE.search(message)
    what = _PLACE.sub("", message).replace("`", "'").replace("Object missing required field", "misses the key")
    what = what.replace("Expected", "expected")
    section, index, key = place.groups() if place else (None, None, None)
    entry = None if index is None else f"entry {int(index) + 1:,} counting from 1"
    where = ", ".join(filter(None, (section, entry, key)))
    fault = f"{where}: {what}" if where else what
    return FormatError(code, f"{path}: {fault}. Correct it there; COCO's data format lists keys and types.")
