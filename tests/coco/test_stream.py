"""The file as bytes: what cannot be opened or cut into records is named, and nothing depends on where a window ends."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from iou_refiner.checks import DataError
from iou_refiner.coco import stream
from iou_refiner.coco.read import read_results
from tests.kit.coco_files import GOOD, put


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file\. Check the path"):
        read_results(tmp_path / "absent.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path)
    with pytest.raises(DataError, match=r"named \.gz, but its content is not gzip"):
        read_results(put(tmp_path, [], "plain.json.gz"))
    with pytest.raises(DataError, match="the gzip stream is broken or cut off"):
        read_results(put(tmp_path, gzip.compress(json.dumps([GOOD] * 99).encode())[:-12], "cut.json.gz"))


def test_a_record_without_end_stops_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WINDOW", 1 << 17)
    monkeypatch.setattr(stream, "_LONGEST_RECORD", 1 << 20)
    path = put(tmp_path, b'[{"image_id": "1, ' + b"." * (2 << 20) + b"}]")
    with pytest.raises(DataError, match="what begins at byte 1 is no record: no end within 1 MiB"):
        read_results(path)
