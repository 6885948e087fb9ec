"""The file in which results stand that are not all there yet: who has it, and what of it is whole.

A first line says what the file is, a block which run it is of, and one block follows for each image: a checksum, a line
of JSON, and the image's records as they will stand in the output.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import msgspec

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

MAGIC = b"iou-refiner: results of a run that is not through, format 1\n"
_SUM = 9  # bytes of a checksum and the blank after it
_TRIES = 100  # where other processes finish in the very moment
_LONGEST_LINE = 1 << 20  # bytes; a line of a journal has some hundred


class Block(msgspec.Struct, forbid_unknown_fields=True):
    """What precedes the records of one image: its id, a hash of its file, and counts over all images so far."""

    image: int
    content: str  # hash of the image file
    records: int
    size: int  # bytes of the records
    counts: dict[str, int]  # after this image, over all so far


def checked(text: bytes) -> bytes:
    """The text with its checksum before it."""
    return b"%08x %s" % (zlib.crc32(text), text)


def write(journal: FileIO, data: bytes) -> None:
    """Write all of ``data``, with nothing held back."""
    view = memoryview(data)
    while view:  # a disk that is all but full takes a part
        view = view[journal.write(view) :]


def read_identity(journal: BinaryIO) -> dict[str, str] | None:
    """Which run a journal is of; None where that cannot be read."""
    journal.seek(len(MAGIC))
    line = journal.readline(_LONGEST_LINE)
    if checked(line[_SUM:] + journal.read(1)) != line + b"\n":
        return None
    try:
        return msgspec.json.decode(line[_SUM:], type=dict[str, str])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def blocks(journal: BinaryIO) -> Iterator[tuple[Block, bytes]]:
    """The blocks of a journal from where it stands, each with its records, up to the first that is not whole."""
    size = os.fstat(journal.fileno()).st_size
    while line := journal.readline(_LONGEST_LINE):
        try:
            block = msgspec.json.decode(line[_SUM:], type=Block)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return
        if not 0 <= block.size < size - journal.tell():
            return
        body = journal.read(block.size + 1)
        if checked(line[_SUM:] + body) != line + body:
            return
        yield block, body[:-1]


def open_locked(path: Path) -> FileIO:
    """The journal, open for this process alone until it is closed; made if missing.

    Raises:
        ValueError: another process has it, or it is no journal.
        FileNotFoundError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    for _ in range(_TRIES):
        if path.is_symlink():
            raise _foreign(path)
        journal = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+")
        try:
            _lock(journal, path)
            if os.path.samestat(os.fstat(journal.fileno()), path.lstat()):
                return journal
        except FileNotFoundError:  # the process that had it was through in this moment
            pass
        except BaseException:
            journal.close()
            raise
        journal.close()
    raise _busy(path)


def _lock(journal: FileIO, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(journal.fileno()).st_mode):
        raise _foreign(path)
    if fcntl is not None:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(path) from None
        except OSError:  # a file system without locks
            pass
    if not MAGIC.startswith(head := journal.read(len(MAGIC))) or (len(head) < len(MAGIC) and journal.read(1)):
        raise _foreign(path)


def _busy(path: Path) -> ValueError:
    return ValueError(
        f"Another process writes {path.name.removesuffix('.partial')} at this moment (it holds {path}). Wait for it, "
        "or name another output."
    )


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"{path} is where images that are done are kept until all are, and it is no such file. Move it away, or name "
        "another output."
    )
