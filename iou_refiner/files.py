"""Writing a file whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

# What a process that was killed leaves behind is removed once it is so many seconds old.
_OLD = 15 * 60
_swept: set[Path] = set()


@contextmanager
def replacing(path: Path, *, tidy: bool = True) -> Iterator[BufferedWriter]:
    """A binary stream to a file beside ``path`` that takes its place once all is written, and vanishes on any error.

    A stream rather than a path, for what is written must not depend on the passing name: torch.save would store it.

    Args:
        path: of the file to come; what is there stays whole until the very end.
        tidy: whether to :func:`sweep` away, once a process, what killed processes left of earlier files of this name.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if tidy and path not in _swept:
        _swept.add(path)
        sweep(path.parent, re.escape(path.name))
    # The process number is for sweep; in containers that share a folder it is not unique, so chance is added.
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        with beside.open("xb") as stream:
            yield stream
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, tidy: bool = True) -> None:
    """Write ``data`` by way of :func:`replacing`."""
    with replacing(path, tidy=tidy) as stream:
        stream.write(data)


def content_hash(path: Path) -> str:
    """SHA-256 of what a file holds.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_json(value: Any, **options: Any) -> str:
    """JSON text of ``value`` by :func:`json.dumps` with its ``options``; null where a number is not finite, as JSON has
    neither NaN nor Infinity."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """``value`` (numbers, texts, lists and dicts) with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def sweep(folder: Path, names: str) -> None:
    """Remove the passing files of :func:`replacing` that killed processes left in ``folder``.

    Only such files go as no living process of this machine can be writing: their process is gone, and nothing was
    written to them for a quarter of an hour. What cannot be removed stays.

    Args:
        folder: where to sweep; folders below it are left alone.
        names: regular expression of the names of the files they were to become.
    """
    passing = re.compile(rf"(?:{names})(?:\.[0-9a-f]{{8}})?\.(\d+)\.tmp")
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = passing.fullmatch(entry.name)
            if match is None or not entry.is_file(follow_symlinks=False) or _is_alive(int(match[1])):
                continue
            with suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD:
                    os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    """Whether there is a process of this number; True where that cannot be known without touching it."""
    if os.name != "posix" or process < 1:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
