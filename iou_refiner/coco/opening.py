"""A file of COCO json before it is read: opening it within bounds, and naming what it is where it is not COCO."""

from __future__ import annotations

import gzip
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from iou_refiner.checks import DataError, shown

WINDOW = 4 << 20  # bytes read at a time
_ANY_UNPACKED = 64 << 20  # bytes that a .gz file may always unpack to
_MOST_PACKED = 100  # bytes that one byte may unpack to beyond that; detections make 3 to 10 of one

CURES = {
    "E102": "Repair the file, or write it again with a JSON library.",
    "E104": "Readers disagree on which of them counts: write each key once.",
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


class Source:
    """The bytes of a file, counted as they come."""

    def __init__(self, stream: BufferedIOBase, path: Path, limit: int | None) -> None:
        self._stream, self._path, self._limit, self._count = stream, path, limit, 0

    def read(self, size: int = WINDOW) -> bytes:
        """Up to ``size`` bytes; a FormatError beyond the limit."""
        block = self._stream.read(size)
        self._count += len(block)
        if self._limit is not None and self._count > self._limit:
            raise FormatError(
                "E102",
                f"{self._path}: unpacks to more than {self._limit >> 20:,} MiB, over {_MOST_PACKED} times its size on "
                "disk: no detections or annotations pack that well. Look at it with gzip -l; if it is right, unpack it "
                "and give the .json file.",
            )
        return block

    def read_all(self) -> bytes:
        """What is left, window by window, so that the limit holds before memory is spent."""
        blocks = []
        while block := self.read():
            blocks.append(block)
        return b"".join(blocks)


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The bytes of a .json or .json.gz file; whatever hinders reading them becomes a FormatError."""
    name = shown(str(path), 400)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a fifo or a device may never end
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise FormatError("E102", f"{name}: cannot be read: it is {kind}. Save the json to a file and name that.")
        packed = path.suffix == ".gz"
        limit = max(_ANY_UNPACKED, _MOST_PACKED * status.st_size) if packed else None
        with gzip.open(path) if packed else path.open("rb") as stream:
            yield Source(stream, path, limit)
    except gzip.BadGzipFile as error:
        raise FormatError("E102", f"{name}: named .gz, but its content is not gzip ({error}). Rename it.") from error
    except (EOFError, zlib.error) as error:
        raise FormatError("E102", f"{name}: the gzip stream is broken or cut off ({error}). Copy it again.") from error
    except FileNotFoundError as error:
        raise FormatError("E102", f"{name}: no such file. Check the path.") from error
    except OSError as error:
        raise FormatError("E102", f"{name}: cannot be read ({error.strerror}). Check the path.") from error
    except ValueError as error:
        if isinstance(error, DataError) or "null" not in str(error):
            raise
        raise FormatError("E102", f"{name}: no path holds a null character. Check the path.") from error


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


def check_head(path: Path, head: bytes, expected: bytes) -> None:
    """Raise a FormatError that names what the file is, unless its first character is ``[`` or ``{``, as expected."""
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            raise FormatError("E102", f"{path}: {what}")
    text = head.lstrip()
    first = text[:1]
    if not first:
        raise FormatError("E102", f"{path}: {_nothing(head, expected)}")
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


def _nothing(head: bytes, expected: bytes) -> str:
    if len(head) >= WINDOW:
        return f"begins with {len(head) >> 20} MiB of blanks. {CURES['E102']}"
    if expected == b"{":
        return 'the file is empty. An annotation holds {"images": [...], "annotations": [...], "categories": [...]}.'
    return "the file is empty. A file without detections holds []."


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
