"""Files whose ids are others are read within the bounds of every other file."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iou_refiner import DataError
from iou_refiner.connectors.ids import read_foreign_results
from tests.kit.scenes import make_truth


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("absent.json", lambda path: None, "no such file"),
        ("folder.json", lambda path: path.mkdir(), "it is a folder"),
        ("pipe.json", lambda path: os.mkfifo(path), "a pipe or a device"),
        ("half.json", lambda path: path.write_text('[{"image_id": "a"'), "is not whole JSON"),
        ("other.json.gz", lambda path: path.write_bytes(b"[]"), "its content is not gzip"),
        ("bomb.json.gz", lambda path: path.write_bytes(gzip.compress(bytes(70 << 20))), "unpacks to more than 64 MiB"),
        ("deep.json", lambda path: path.write_text("[" * 200_000), "is not whole JSON"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(name: str, make: Callable[[Path], Any], said: str, tmp_path: Path):
    make(tmp_path / name)
    with pytest.raises(DataError, match=said):
        read_foreign_results(tmp_path / name, make_truth([1], [1]), image_ids="file_name")
