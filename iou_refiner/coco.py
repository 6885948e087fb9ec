"""COCO json in and out, and nothing else.

A results file is one list of records; it is read in windows of whole records, so a file of a million needs little
more memory than its columns. Boxes here are ``(x, y, width, height)`` in pixels of the original image: the only place
of the package where they are. Imports no torch.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from iou_refiner._checks import DataError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_WINDOW = 4 << 20  # bytes read at a time
_LONGEST_RECORD = 32 << 20  # bytes; a "record" beyond it is a file whose quotes or brackets do not close
_ROWS_PER_WRITE = 1 << 15

_ID_LIMITS = (-(2**63), 2**63 - 1)
_Id = Annotated[int, msgspec.Meta(ge=_ID_LIMITS[0], le=_ID_LIMITS[1])]
_Box = tuple[float, float, float, float]

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


def group_rows(ids: IntArray) -> dict[int, IntArray]:
    """Row indices of each id, ascending in both: (n,) int64 to arrays that together hold 0 to n - 1. One sort."""
    order = np.argsort(ids, kind="stable")
    steps = np.flatnonzero(np.diff(ids[order])) + 1
    groups = np.split(order, steps) if len(ids) else []
    return {int(ids[rows[0]]): rows for rows in groups}


def xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """(n, 4) rows ``(x, y, width, height)`` to rows ``(x1, y1, x2, y2)``, a new array."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def xyxy_to_xywh(boxes: FloatArray) -> FloatArray:
    """(n, 4) rows ``(x1, y1, x2, y2)`` to rows ``(x, y, width, height)``, a new array."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


# Results ------------------------------------------------------------------------------------------------------------


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


# Opening a file, and naming what is not a COCO file -------------------------------------------------------------------


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
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
            f"{path}: expected an object with images, annotations and categories, found {_quoted(text)}. "
            "Give the ground truth file, not a results file.",
        )
    if first == b"{":
        raise _object_in_place_of_list(path, text)
    code = "E101" if first in b'"-0123456789tfn' else "E102"
    raise FormatError(code, f"{path}: expected a JSON list of records, found {_quoted(text)}. {CURES['E102']}")


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


def _quoted(text: bytes) -> str:
    return repr(text[:20].decode("utf-8", "replace"))


# Windows of whole records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Window:
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


def _windows(stream: BufferedIOBase, path: Path) -> Iterator[_Window]:
    data = stream.read(_WINDOW)
    _check_head(path, data, b"[")
    offset = data.index(b"[") + 1
    data = data[offset:]
    while True:
        starts, ends, close = _split(data)
        used = int(ends[-1]) if len(ends) else 0
        if len(ends):
            yield _Window(data, starts, ends, offset)
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
        found = f"{_quoted(before.strip())} before the list's closing bracket (after byte {offset:,})"
    elif after[:1] == b"}":
        found = "a brace where the list should close with a bracket"
    elif after[1:].strip():
        found = f"{_quoted(after[1:].strip())} after the list's closing bracket"
    else:
        return
    raise FormatError("E102", f"{path}: expected only records in one list, found {found}. {CURES['E102']}")


# Records --------------------------------------------------------------------------------------------------------------


class _Record(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    image_id: _Id
    category_id: _Id
    bbox: _Box
    score: float
    iou: float = float("nan")  # JSON cannot say NaN, so here it means absent


class _RecordWithMore(_Record, forbid_unknown_fields=False):
    """The same, next to keys that are not named here."""


_PLAIN_RECORDS = msgspec.json.Decoder(list[_Record])
_RECORDS = msgspec.json.Decoder(list[_RecordWithMore])
_OBJECTS = msgspec.json.Decoder(list[dict[str, Any]])
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some consecutive readable records of a file: their rows, with NaN for an absent iou, and their numbers from 1."""

    results: Results
    numbers: IntArray


def _columns(records: Sequence[_Record], extra: tuple[dict[str, Any], ...] | None) -> Results:
    count = len(records)
    return Results(
        np.fromiter((record.image_id for record in records), np.int64, count),
        np.fromiter((record.category_id for record in records), np.int64, count),
        np.fromiter(chain.from_iterable(record.bbox for record in records), np.float64, 4 * count).reshape(count, 4),
        np.fromiter((record.score for record in records), np.float64, count),
        np.fromiter((record.iou for record in records), np.float64, count),
        extra,
    )


def _decode(body: bytes) -> Results:
    """Columns of a JSON list of records; raises one of ``_UNDECODABLE``."""
    try:
        return _columns(_PLAIN_RECORDS.decode(body), None)
    except _UNDECODABLE:  # perhaps only for a key of the user's own, which costs a second pass to keep
        records = _RECORDS.decode(body)
        return _columns(records, tuple(_other_keys(found) for found in _OBJECTS.decode(body)))


def _other_keys(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _Record.__struct_fields__}


def iter_results(path: str | Path, report: Callable[[Problem], None]) -> Iterator[Chunk]:
    """Read a results file window by window, hand every fault of a record to ``report``, and go on with the next.

    Args:
        path: a .json or .json.gz file, one list of records.
        report: called once per fault; may raise to stop. Faulty records are left out of the chunks.

    Raises:
        FormatError: the file as a whole cannot be read further.
    """
    path = Path(path)
    first = 1
    with _opened(path) as stream:
        for window in _windows(stream, path):
            start, end = int(window.starts[0]), int(window.ends[-1])
            numbers = np.arange(first, first + len(window.starts))
            gap = window.data[:start].strip()
            try:
                if gap != (b"" if first == 1 else b","):
                    raise msgspec.DecodeError
                chunk = Chunk(_decode(b"[" + window.data[start:end] + b"]"), numbers)
            except _UNDECODABLE:
                chunk = _decode_one_by_one(window, first, report)
            yield chunk
            first += len(numbers)


def _decode_one_by_one(window: _Window, first: int, report: Callable[[Problem], None]) -> Chunk:
    """The readable records of a window in which something is wrong, all else reported."""
    readable, numbers, position = [], [], 0
    for number, (start, end) in enumerate(zip(window.starts.tolist(), window.ends.tolist(), strict=True), first):
        gap = window.data[position:start].strip()
        if gap != (b"" if number == 1 else b","):
            where = f"before it (byte {window.offset + position:,})"
            expected = "nothing" if number == 1 else "a comma"
            report(Problem("E102", number, None, f"expected {expected} {where}, found {_quoted(gap)}."))
        position, text = end, window.data[start:end]
        try:
            _RECORDS.decode(b"[" + text + b"]")
            _OBJECTS.decode(b"[" + text + b"]")
        except _UNDECODABLE as error:
            image_id, faults = _faults(text)
            for code, what in faults or [("E202", f"{error}.")]:
                report(Problem(code, number, image_id, what))
        else:
            readable.append(text)
            numbers.append(number)
    return Chunk(_decode(b"[" + b",".join(readable) + b"]"), np.array(numbers, np.int64))


def _faults(text: bytes) -> tuple[int | None, list[tuple[str, str]]]:
    """The image id of a record that did not decode, and all that is wrong with it as (code, text)."""
    literals: list[str] = []  # what JSON does not know and Python's reader does

    def constant(literal: str) -> float:
        literals.append(literal)
        return float(literal)

    try:
        record = json.loads(text, parse_constant=constant)
    except RecursionError:
        return None, [("E102", "is nested too deeply to be read.")]
    except ValueError as error:
        return None, [("E102", f"is not JSON ({error}).")]
    if not isinstance(record, dict):
        return None, [("E202", f"is {_kind(record)}, expected an object.")]
    faults = [*_id_faults(record), *_box_faults(record), *_number_faults(record)]
    if literals:
        faults = [fault for fault in faults if fault[0] != "E204"]
        faults.append(("E103", f"holds the literal {', '.join(sorted(set(literals)))}, which JSON does not know."))
    image_id = record.get("image_id")
    return image_id if _is_id(image_id) else None, faults


def _is_id(value: object) -> bool:
    return type(value) is int and _ID_LIMITS[0] <= value <= _ID_LIMITS[1]


def _is_finite(value: Any) -> bool:
    return bool(abs(value) <= sys.float_info.max)


def _id_faults(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("image_id", "category_id"):
        if key not in record:
            yield "E201", f"has no {key}."
        elif not _is_id(record[key]):
            yield "E202", f"{key} is {_kind(record[key])}, expected an integer of 64 bits."


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


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, str):
        return f"a string ({json.dumps(value[:40], ensure_ascii=False)})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"the number {value}"


def join_chunks(chunks: Iterable[Chunk], report: Callable[[Problem], None]) -> Chunk:
    """All chunks of a file as one, its ``iou`` None where no record has one; reports records that alone lack it."""
    chunks = list(chunks)
    results = Results.concat(chunk.results for chunk in chunks)
    numbers = np.concatenate([np.empty(0, np.int64), *(chunk.numbers for chunk in chunks)])
    if results.iou is None:
        return Chunk(results, numbers)
    absent = np.isnan(results.iou)
    if not absent.any():
        return Chunk(results, numbers)
    if not absent.all():
        for row in np.flatnonzero(absent).tolist():
            text = "has no iou, though other records have one."
            report(Problem("E201", int(numbers[row]), int(results.image_id[row]), text))
    without = Results(results.image_id, results.category_id, results.bbox, results.score, None, results.extra)
    return Chunk(without, numbers)


def read_results(path: str | Path) -> Results:
    """Read detections from a .json or .json.gz file.

    Types and finiteness are checked, meaning is not (sizes, ranges, ids unknown to a ground truth): ``validate`` does.

    Raises:
        DataError: the first fault found, naming file, record and cure.
    """

    def refuse(problem: Problem) -> None:
        raise FormatError(problem.code, f"{path}: {problem} {CURES[problem.code]}")

    return join_chunks(iter_results(path, refuse), refuse).results


# Writing --------------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(path: Path) -> Iterator[BufferedIOBase]:
    """A stream to a file beside ``path`` that takes its place once all is written, and vanishes on any error."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as raw:
            if path.suffix == ".gz":  # no name and no time inside: same input, same bytes
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream:
                    yield stream
            else:
                yield raw
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_results(
    path: str | Path,
    results: Results,
    *,
    box_decimals: int = 2,
    score_decimals: int = 6,
    image_order: Sequence[int] | None = None,
) -> None:
    """Write detections as COCO json, one record a line; the same results give the same bytes.

    Records go image by image, by falling score within each (ties keep their order), so that AP does not depend on
    the order in which they were found.

    Args:
        path: written beside and renamed; compressed if it ends in .gz.
        results: n records.
        box_decimals: of bbox. Two cost no AP; none costs .3 points of AP75.
        score_decimals: of score and iou.
        image_order: image ids, e.g. of the ground truth; None for the order of first appearance in ``results``.

    Raises:
        DataError: a number is not finite.
        ValueError: ``image_order`` lacks an image of ``results``.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    for name, values in (("bbox", results.bbox), ("score", results.score), ("iou", results.iou)):
        _check_finite(path, results, name, values)
    order = _writing_order(results, image_order)
    with _replacing(path) as stream:
        stream.write(b"[\n")
        for start in range(0, len(order), _ROWS_PER_WRITE):
            records = _to_dicts(results[order[start : start + _ROWS_PER_WRITE]], box_decimals, score_decimals)
            stream.write((b",\n" if start else b"") + b",\n".join(map(msgspec.json.encode, records)))
        stream.write(b"\n]\n")


def _check_finite(path: Path, results: Results, name: str, values: FloatArray | None) -> None:
    if values is None:
        return
    finite = np.isfinite(values)
    bad = np.flatnonzero(~(finite.all(1) if finite.ndim == 2 else finite))
    if len(bad):
        row = int(bad[0])
        problem = Problem(
            "E204", row + 1, int(results.image_id[row]), f"{name} is not finite ({values[row].tolist()})."
        )
        raise FormatError("E204", f"{path} is not written: {problem} {CURES['E204']}")


def _writing_order(results: Results, image_order: Sequence[int] | None) -> IntArray:
    ids, first, inverse = np.unique(results.image_id, return_index=True, return_inverse=True)
    place = first  # of each image: the row it first appears in, or its position in image_order
    if image_order is not None:
        position = {int(image): index for index, image in enumerate(image_order)}
        missing = [image for image in ids.tolist() if image not in position]
        if missing:
            raise ValueError(f"`image_order` must list every image of `results`, it lacks {missing[:5]}.")
        place = np.array([position[image] for image in ids.tolist()], np.int64)
    return np.lexsort((-results.score, place[inverse]))


def _rounded(values: FloatArray, decimals: int) -> list[Any]:
    rounded: list[Any] = (np.round(values, decimals) + 0.0).tolist()  # + 0.0 turns -0.0 into 0.0
    return rounded


def _to_dicts(results: Results, box_decimals: int, score_decimals: int) -> Iterator[dict[str, Any]]:
    columns: dict[str, list[Any]] = {
        "image_id": results.image_id.tolist(),
        "category_id": results.category_id.tolist(),
        "bbox": _rounded(results.bbox, box_decimals),
        "score": _rounded(results.score, score_decimals),
    }
    if results.iou is not None:
        columns["iou"] = _rounded(results.iou, score_decimals)
    extra = results.extra or ({},) * len(results)
    for other, row in zip(extra, zip(*columns.values(), strict=True), strict=True):
        own = dict(zip(columns, row, strict=True))
        yield {**own, **other, **own}  # the columns come first and win


# Ground truth ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """An image of the ground truth; sizes in pixels."""

    id: _Id
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class Category:
    """A category of the ground truth."""

    id: _Id
    name: str


class Annotation(msgspec.Struct, gc=False):
    """An annotation as it stands in the file; keys not named here (segmentation, keypoints) are skipped unread."""

    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: _Box
    area: float | None = None
    iscrowd: int | None = None
    ignore: int | bool | None = None


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
        found = group_rows(self.image_id)
        return {image.id: found.get(image.id, np.empty(0, np.int64)) for image in self.images}

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


_PLACE = re.compile(r" - at `\$(?:\.(\w+)(?:\[(\d+)\])?(?:\.(\w+))?)?.*`$")


def read_ground_truth_file(path: str | Path) -> GroundTruthFile:
    """Read a .json or .json.gz ground truth file as it stands.

    Raises:
        FormatError: the first fault found, naming file, entry and cure.
    """
    path = Path(path)
    with _opened(path) as stream:
        data = stream.read()
    _check_head(path, data[:_WINDOW], b"{")
    try:
        return msgspec.json.decode(data, type=GroundTruthFile)
    except msgspec.ValidationError as error:
        raise _entry_error(path, str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        offset = re.search(r"\(byte (\d+)\)", str(error))
        literal = re.match(rb"-?(NaN|Infinity)", data[int(offset[1]) :]) if offset else None
        if literal:
            text = f"holds the literal {literal[0].decode()} at byte {int(offset[1]):,}"  # type: ignore[index]
            raise FormatError("E103", f"{path}: {text}. {CURES['E103']}") from error
        raise FormatError("E102", f"{path}: is not whole JSON ({error}). {CURES['E102']}") from error


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


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Read annotated images from a .json or .json.gz file.

    Raises:
        DataError: the file breaks its format, an image or category id occurs twice, or an annotation names an image
            or category that is not listed.
    """
    return to_ground_truth(read_ground_truth_file(path), path)


def to_ground_truth(file: GroundTruthFile, path: str | Path) -> GroundTruth:
    """Columns of a ground truth file, missing area and iscrowd filled; ``path`` is for messages.

    Raises:
        DataError: as :func:`read_ground_truth`.
    """
    rows, count = file.annotations, len(file.annotations)
    image_id = np.fromiter((row.image_id for row in rows), np.int64, count)
    category_id = np.fromiter((row.category_id for row in rows), np.int64, count)
    bbox = np.fromiter(chain.from_iterable(row.bbox for row in rows), np.float64, 4 * count).reshape(count, 4)
    area = np.fromiter((np.nan if row.area is None else row.area for row in rows), np.float64, count)
    for name, listed, used in (
        ("image", [image.id for image in file.images], image_id),
        ("category", [category.id for category in file.categories], category_id),
    ):
        _check_listed(path, name, np.array(listed, np.int64), used)
    return GroundTruth(
        tuple(file.images),
        tuple(file.categories),
        np.fromiter((row.id for row in rows), np.int64, count),
        image_id,
        category_id,
        bbox,
        np.where(np.isnan(area), bbox[:, 2] * bbox[:, 3], area),
        np.fromiter((bool(row.iscrowd) for row in rows), np.bool_, count),
    )


def _check_listed(path: str | Path, name: str, listed: IntArray, used: IntArray) -> None:
    ids, counts = np.unique(listed, return_counts=True)
    if (counts > 1).any():
        twice = ids[counts > 1][:5].tolist()
        raise FormatError("E401", f"{path}: {name} ids must be unique, {twice} occur more than once. Number them anew.")
    unknown = np.flatnonzero(~np.isin(used, ids))
    if len(unknown):
        entry = int(unknown[0])
        code = "E301" if name == "image" else "E302"
        text = f"annotations, entry {entry + 1:,} counting from 1: {name} {used[entry]} is not listed in the file"
        raise FormatError(code, f"{path}: {text} ({len(unknown):,} such). List it, or drop the annotation.")
