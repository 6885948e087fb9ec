"""COCO json in: annotated images, one object that is read as a whole, into columns."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from iou_refiner.checks import shown
from iou_refiner.coco.data import Annotation, GroundTruth, GroundTruthFile, ImagesFile, IntArray
from iou_refiner.coco.opening import CURES, WINDOW, FormatError, check_head, opened

T = TypeVar("T", bound=msgspec.Struct)

_AT_ONCE = 1 << 12  # entries looked at together
_MOST_BYTES = 8 << 30  # of a file that is read as a whole; the largest public ones have 3 GB


def read_object(path: Path, kind: type[T]) -> T:
    """The one JSON object of a ground truth file, as the msgspec type ``kind``; raises for the first fault found."""
    data = read_whole(path)
    try:
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise object_error(path, data, error) from error
    for section, entry, key in keys_twice(data, [field.name for field in msgspec.structs.fields(kind)]):
        where = f"{section}, entry {entry:,} counting from 1" if section else "the file's own keys"
        raise FormatError("E104", f"{path}: {where}: '{shown(key, 40)}' stands more than once. {CURES['E104']}")
    return value


def keys_twice(data: bytes, sections: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """The keys that stand more than once in an object, of which every reader takes another one.

    Args:
        data: a JSON object that decodes.
        sections: those of its keys that hold lists of objects to look at.

    Yields:
        Section, entry counting from 1, key; ("", 0, key) for the keys of ``data`` itself.
    """
    root = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    if _may_repeat(data, root):
        yield from (("", 0, key) for key in _repeated(data))
    for section in sections:
        entries = msgspec.json.decode(root[section], type=list[msgspec.Raw]) if section in root else []
        for start in range(0, len(entries), _AT_ONCE):
            some = [bytes(entry) for entry in entries[start : start + _AT_ONCE]]
            text = b"[" + b",".join(some) + b"]"
            if _may_repeat(text, msgspec.json.decode(text, type=list[dict[str, msgspec.Raw]])):
                for number, entry in enumerate(some, start + 1):
                    yield from ((section, number, key) for key in _repeated(entry))


def _may_repeat(text: bytes, decoded: object) -> bool:
    """Whether JSON text has other quotes than what was decoded of it, as where a key stands twice."""
    return b"u0022" in text or text.count(b'"') != msgspec.json.encode(decoded).count(b'"')


def _repeated(text: bytes) -> list[str]:
    """The keys that stand more than once in the object itself."""
    outermost: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> None:
        outermost[:] = [key for key, count in Counter(key for key, _ in items).items() if count > 1]

    json.loads(text, object_pairs_hook=pairs)  # which calls it for the outermost object last
    return outermost


def read_whole(path: Path) -> bytes:
    """The bytes of a file that holds one JSON object, checked as far as its first character tells."""
    with opened(path) as stream:
        head = stream.read(WINDOW)
        check_head(path, head, b"{")
        if path.stat().st_size > _MOST_BYTES:
            text = f"{path}: has more than {_MOST_BYTES >> 30} GiB, and an annotation is read as a whole"
            raise FormatError("E102", f"{text}. Split it by images.")
        return head + stream.read_all()


_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def object_error(path: Path, data: bytes, error: Exception) -> FormatError:
    """What is wrong with a file whose content did not decode, with its cure."""
    if isinstance(error, msgspec.ValidationError):
        return _entry_error(path, str(error))
    offset = re.search(r"\(byte (\d+)\)", str(error))
    literal = re.match(rb"-?(NaN|Infinity)", data[int(offset[1]) :]) if offset else None
    if literal:
        text = f"holds the literal {literal[0].decode()} at byte {int(offset[1]):,}"  # type: ignore[index]
        return FormatError("E103", f"{path}: {text}. {CURES['E103']}")
    if surrogate := _LONE_SURROGATE.search(data):
        text = f"holds half a surrogate pair, {surrogate[0].decode('ascii', 'replace')}, at byte {surrogate.start():,}"
        return FormatError("E102", f"{path}: {text}, which is no text. Write that name again in UTF-8.")
    return FormatError("E102", f"{path}: is not whole JSON ({error}). {CURES['E102']}")


_PLACE = re.compile(r" - at `\$(?:\.(\w+)(?:\[(\d+)\])?(?:\.(\w+))?)?.*`$")


def _entry_error(path: Path, message: str) -> FormatError:
    """The decoder's own words, its path (``$.annotations[3].area``) turned into an entry counted from 1."""
    code = "E201" if "missing required" in message else "E203" if ".bbox" in message else "E202"
    code = "E204" if "out of range" in message else code
    place = _PLACE.search(message)
    what = _PLACE.sub("", message).replace("`", "'").replace("Object missing required field", "misses the key")
    what = what.replace("Expected", "expected")
    section, index, key = place.groups() if place else (None, None, None)
    entry = None if index is None else f"entry {int(index) + 1:,} counting from 1"
    where = ", ".join(filter(None, (section, entry, key)))
    fault = f"{where}: {what}" if where else what
    cure = "Correct it there; COCO's data format lists keys and types."
    if code == "E204":
        cure = "No float holds that number: correct it there, or drop the entry."
    elif section is None and "'annotations'" in what:
        cure += " Files without annotations (image_info_*.json) do for dump and rescore, which do not use them."
    elif "expected 'int" in what and "got 'float'" in what:
        cure += " If it is a whole number written as 1.0: iou-refiner validate --ann FILE --fix OUT"
    return FormatError(code, f"{path}: {fault}. {cure}")


def read_ground_truth_file(path: str | Path) -> GroundTruthFile:
    """Read a .json or .json.gz ground truth file as it stands.

    Raises:
        FormatError: the first fault found, naming file, entry and cure.
    """
    return read_object(Path(path), GroundTruthFile)


def read_annotation_or_images(path: str | Path) -> tuple[GroundTruthFile, bool]:
    """The same for a file that may have no annotations, and whether it has them.

    Raises:
        FormatError: as :func:`read_ground_truth_file`.
    """
    file = read_object(Path(path), _ImagesOrMore)
    if isinstance(file.annotations, msgspec.UnsetType):
        return GroundTruthFile(file.images, [], file.categories), False
    return GroundTruthFile(file.images, file.annotations, file.categories), True


class _ImagesOrMore(ImagesFile):
    annotations: list[Annotation] | msgspec.UnsetType = msgspec.UNSET


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Read annotated images from a .json or .json.gz file.

    Raises:
        DataError: the file breaks its format, an image or category id occurs twice, or an annotation names an image
            or category that is not listed or has an iscrowd other than 0 and 1.
    """
    return to_ground_truth(read_ground_truth_file(path), path)


def read_images(path: str | Path) -> GroundTruth:
    """Read the images and categories of a .json or .json.gz file for work that uses no annotation (dump, rescore).

    ``annotations`` may be missing, as in COCO's ``image_info_*.json``, and are skipped unread where they are there:
    what comes back has none (``len(...) == 0``).

    Raises:
        DataError: the file breaks its format, or an image or category id occurs twice.
    """
    file = read_object(Path(path), ImagesFile)
    return to_ground_truth(GroundTruthFile(file.images, [], file.categories), path)


def to_ground_truth(file: GroundTruthFile, path: str | Path, *, any_crowd: bool = False) -> GroundTruth:
    """Columns of a ground truth file, missing area and iscrowd filled; ``path`` is for messages.

    An iscrowd that is neither 0 nor 1 is refused, or taken for 1 with ``any_crowd``.

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
    if not any_crowd:
        _check_crowd(path, file)
    with np.errstate(over="ignore", invalid="ignore"):  # absurd numbers are told by those who use them
        area = np.where(np.isnan(area), bbox[:, 2] * bbox[:, 3], area)
    return GroundTruth(
        tuple(file.images),
        tuple(file.categories),
        np.fromiter((row.id for row in rows), np.int64, count),
        image_id,
        category_id,
        bbox,
        area,
        np.fromiter((bool(row.iscrowd) for row in rows), np.bool_, count),
    )


def _check_crowd(path: str | Path, file: GroundTruthFile) -> None:
    wrong = [entry for entry, row in enumerate(file.annotations) if row.iscrowd not in (None, 0, 1)]
    if wrong:
        text = f"annotations, entry {wrong[0] + 1:,} counting from 1: iscrowd is {file.annotations[wrong[0]].iscrowd}"
        raise FormatError(
            "E407", f"{path}: {text} ({len(wrong):,} such), expected 0 or 1. Set 1 for regions that are not judged."
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
