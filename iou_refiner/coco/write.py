"""COCO results as json out: the same results give the same bytes."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from iou_refiner.coco.data import FloatArray, IntArray, Results
from iou_refiner.coco.opening import CURES, FormatError, Problem
from iou_refiner.files import replacing

_ROWS_PER_WRITE = 1 << 15


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
    the order in which they come.

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
    _check_numbers(path, results)
    order = _writing_order(results, image_order)
    with stream_to(path) as stream:
        stream.write(b"[\n")
        for start in range(0, len(order), _ROWS_PER_WRITE):
            records = _to_dicts(results[order[start : start + _ROWS_PER_WRITE]], box_decimals, score_decimals)
            stream.write((b",\n" if start else b"") + b",\n".join(map(msgspec.json.encode, records)))
        stream.write(b"\n]\n")


def encode_records(results: Results, path: Path, *, box_decimals: int = 2, score_decimals: int = 6) -> bytes:
    """The records of one image as they stand in a file, one a line by falling score; nothing for no records.

    Args:
        results: records of one image.
        path: of the file they are for, for the message.
        box_decimals, score_decimals: as for :func:`write_results`.

    Raises:
        DataError: a number is not finite.
    """
    _check_numbers(path, results)
    ordered = results[np.argsort(-results.score, kind="stable")]
    return b",\n".join(map(msgspec.json.encode, _to_dicts(ordered, box_decimals, score_decimals)))


def _check_numbers(path: Path, results: Results) -> None:
    for name, values in (("bbox", results.bbox), ("score", results.score), ("iou", results.iou)):
        _check_finite(path, results, name, values)


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


@contextmanager
def stream_to(path: Path) -> Iterator[BufferedIOBase]:
    """A stream to the file that will replace ``path``, compressed if its name says so."""
    with replacing(path) as raw:
        if path.suffix == ".gz":  # no name and no time inside: same input, same bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream:
                yield stream
        else:
            yield raw
