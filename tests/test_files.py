"""A file is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from iou_refiner.files import replacing


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
