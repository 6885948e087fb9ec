"""A file is written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iou_refiner.files import replacing, to_json, write_whole


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_takes_the_place_of_what_was(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"before, and longer")
    with replacing(path) as stream:
        stream.write(b"after")
        stream.flush()
        assert path.read_bytes() == b"before, and longer"
    assert content(tmp_path) == {"file.bin": b"after"}


def test_a_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "file.bin") as stream:
        stream.write(b"half")
        stream.flush()
        assert "file.bin" not in content(tmp_path)
        stream.write(b" and half")
    assert content(tmp_path) == {"file.bin": b"half and half"}


def broken_off(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as stream:
        stream.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file.bin").write_bytes(b"before")
    with pytest.raises(error):
        broken_off(tmp_path / "file.bin", error)
    assert content(tmp_path) == {"file.bin": b"before"}


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), replacing(tmp_path / "folder") as stream:
        stream.write(b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"file\.bin: the folder .*absent does not exist\. Create it first\."),
        replacing(tmp_path / "absent" / "file.bin"),
    ):
        pass


# ---- What killed processes left. ----

QUARTER = 15 * 60


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("name", "age", "swept"),
    [
        ("file.bin.{gone}.tmp", QUARTER + 5, True),  # as earlier versions named them
        ("file.bin.0123abcd.{gone}.tmp", QUARTER + 5, True),
        ("file.bin.0123abcd.{gone}.tmp", QUARTER - 60, False),
        ("file.bin.0123abcd.{gone}.tmp", -1000, False),  # of a clock that runs ahead
        ("file.bin.0123abcd.{alive}.tmp", 10 * QUARTER, False),
        ("file.bin.0123abcd.{own}.tmp", 10 * QUARTER, False),
        ("file.bin.0123abcd.0.tmp", 10 * QUARTER, False),
        ("file.bin.0123abcd.99999999999999999999999.tmp", 10 * QUARTER, False),  # no number of a process
        ("other.bin.0123abcd.{gone}.tmp", 10 * QUARTER, False),
        ("file.bin.notes.{gone}.tmp", 10 * QUARTER, False),
        ("fileXbin.0123abcd.{gone}.tmp", 10 * QUARTER, False),  # the dot is no pattern
        ("file.bin.tmp", 10 * QUARTER, False),
    ],
)
def test_only_what_a_dead_process_left_is_swept(tmp_path: Path, gone: int, name: str, age: int, swept: bool) -> None:
    left = tmp_path / name.format(gone=gone, alive=os.getppid(), own=os.getpid())
    left.write_bytes(b"half")
    os.utime(left, (time.time() - age,) * 2)
    write_whole(tmp_path / "file.bin", b"whole")
    assert left.exists() != swept
    assert (tmp_path / "file.bin").read_bytes() == b"whole"


def test_links_and_folders_are_not_swept(tmp_path: Path, gone: int) -> None:
    (tmp_path / "kept").write_bytes(b"mine")
    (tmp_path / f"file.bin.{gone}.tmp").symlink_to(tmp_path / "kept")
    (tmp_path / f"file.bin.0123abcd.{gone}.tmp").mkdir()
    os.utime(tmp_path / "kept", (0, 0))
    os.utime(tmp_path / f"file.bin.0123abcd.{gone}.tmp", (0, 0))
    write_whole(tmp_path / "file.bin", b"whole")
    assert len(list(tmp_path.iterdir())) == 4


def test_two_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "file.bin") as one, replacing(tmp_path / "file.bin") as other:
        one.write(b"one")
        other.write(b"other")
    assert content(tmp_path) == {"file.bin": b"one"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": float("nan"), "b": [1.5, float("inf")]}, '{"a": null, "b": [1.5, null]}'),
        ((1, "NaN", None, True), '[1, "NaN", null, true]'),
    ],
)
def test_json_is_json(value: object, text: str) -> None:
    assert to_json(value) == text
