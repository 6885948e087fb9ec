"""Writing a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[BufferedWriter]:
    """A binary stream to a file beside ``path`` that takes its place once all is written, and vanishes on any error.

    A stream rather than a path, for what is written must not depend on the passing name: torch.save would store it.

    Args:
        path: of the file to come; what is there stays whole until the very end.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as stream:
            yield stream
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` by way of :func:`replacing`."""
    with replacing(path) as stream:
        stream.write(data)
