"""COCO json in: results record by record into columns, every fault named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from iou_refiner.coco.data import Box, Id, IntArray, Results
from iou_refiner.coco.faults import faults_of
from iou_refiner.coco.opening import CURES, FormatError, Problem, opened, quoted
from iou_refiner.coco.stream import Window, count_keys, windows


class _Record(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    image_id: Id
    category_id: Id
    bbox: Box
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


def decode(body: bytes) -> Results:
    """Columns of a JSON list of records; raises one of ``_UNDECODABLE``."""
    try:
        results = _columns(_PLAIN_RECORDS.decode(body), None)
        keys = 4 * len(results) + int(np.count_nonzero(~np.isnan(results.iou)))  # type: ignore[arg-type] # never None here
        # Values are numbers here, so that quotes are those of keys.
        _check_once(int(np.count_nonzero(np.frombuffer(body, np.uint8) == ord('"'))), 2 * keys)
    except _UNDECODABLE:  # perhaps only for a key of the user's own, which costs a second pass to keep
        records, objects = _RECORDS.decode(body), _OBJECTS.decode(body)
        results = _columns(records, tuple(_other_keys(record) for record in objects))
        _check_once(count_keys(body), sum(map(len, objects)))
    return results


def _check_once(count: int, expected: int) -> None:
    if count != expected:
        raise msgspec.DecodeError("a key stands twice")


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
    with opened(path) as stream:
        for window in windows(stream, path):
            start, end = int(window.starts[0]), int(window.ends[-1])
            numbers = np.arange(first, first + len(window.starts))
            gap = window.data[:start].strip()
            try:
                if gap != (b"" if first == 1 else b","):
                    raise msgspec.DecodeError
                chunk = Chunk(decode(b"[" + window.data[start:end] + b"]"), numbers)
            except _UNDECODABLE:
                chunk = _decode_one_by_one(window, first, report)
            yield chunk
            first += len(numbers)


def _decode_one_by_one(window: Window, first: int, report: Callable[[Problem], None]) -> Chunk:
    """The readable records of a window in which something is wrong, all else reported."""
    readable, numbers, position = [], [], 0
    for number, (start, end) in enumerate(zip(window.starts.tolist(), window.ends.tolist(), strict=True), first):
        gap = window.data[position:start].strip()
        if gap != (b"" if number == 1 else b","):
            where = f"before it (byte {window.offset + position:,})"
            expected = "nothing" if number == 1 else "a comma"
            report(Problem("E102", number, None, f"expected {expected} {where}, found {quoted(gap)}."))
        position, text = end, window.data[start:end]
        try:
            _RECORDS.decode(b"[" + text + b"]")
            _check_once(count_keys(b"[" + text + b"]"), len(_OBJECTS.decode(b"[" + text + b"]")[0]))
        except _UNDECODABLE as error:
            image_id, faults = faults_of(text)
            for code, what in faults or [("E102", f"cannot be decoded ({error}).")]:
                report(Problem(code, number, image_id, what))
        else:
            readable.append(text)
            numbers.append(number)
    return Chunk(decode(b"[" + b",".join(readable) + b"]"), np.array(numbers, np.int64))


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
