"""A results file that grows image by image: whatever becomes of a run, the next call ends with the same bytes."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.checks import DataError
from iou_refiner.coco import Image, Results, resumable, write_results
from iou_refiner.coco import journal as locking
from iou_refiner.coco.journal import MAGIC
from iou_refiner.coco.resumable import PartialResults, partial_path
from tests.kit.coco_files import SETTINGS

IMAGES = [Image(number, f"{number}.png", 10, 10) for number in (7, 3, 9, 4, 5)]
SIZES = {7: 2, 3: 0, 9: 3, 4: 1, 5: 0}
IDENTITY = {"version": "1", "top": "3"}
NAMES = pytest.mark.parametrize("name", ["out.json", "out.json.gz"])


def part(image: Image) -> Results:
    """Records of an image, not by falling score."""
    rng, count = np.random.default_rng(image.id), SIZES[image.id]
    ids = np.full(count, image.id, np.int64)
    return Results(ids, ids * 0 + 1, rng.uniform(0, 9, (count, 4)), rng.uniform(0, 1, count), rng.uniform(0, 1, count))


def content(image: Image) -> str:
    return f"pixels of {image.id}"


def opened(path: Path, content: Callable[[Image], str] = content, **identity: str) -> PartialResults:
    return PartialResults(path, IDENTITY | identity, IMAGES, content, {"images": 0, "boxes": 0})


class Stopped(Exception):
    pass


def work(path: Path, stop: int | None = None, **options: object) -> tuple[int, str]:
    """Do what is still to be done, up to ``stop`` images in all; how many were there before, and the note."""
    with opened(path, **options) as partial:  # type: ignore[arg-type]
        done, note = partial.done, partial.note
        for image in list(partial.todo):
            if partial.done == stop:
                raise Stopped
            result = part(image)
            boxes = partial.counts["boxes"] + len(result)
            partial.add(result, {"images": partial.counts["images"] + 1, "boxes": boxes})
        assert partial.counts == {"images": 5, "boxes": 6}
        assert partial.records == 6
        partial.finish()
    return done, note


def stopped(path: Path, images: int) -> bytes:
    """The journal of a run that was stopped after some images."""
    with pytest.raises(Stopped):
        work(path, images)
    return partial_path(path).read_bytes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the whole output, written at once."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("out.json", "out.json.gz"):
        write_results(folder / name, Results.concat(map(part, IMAGES)), image_order=[image.id for image in IMAGES])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a run that was stopped after four images."""
    return stopped(tmp_path_factory.mktemp("journal") / "out.json", 4)


@NAMES
@pytest.mark.parametrize("images", range(5))
def test_image_by_image_the_bytes_are_those_of_all_at_once(
    tmp_path: Path, expected: dict[str, bytes], name: str, images: int
) -> None:
    assert work(tmp_path / name) == (0, "")
    assert (tmp_path / name).read_bytes() == expected[name]
    if images:
        stopped(tmp_path / name, images)
    assert (tmp_path / name).read_bytes() == expected[name]  # what was there stays until the end
    done, note = work(tmp_path / name)
    assert done == images
    assert note == (f"{tmp_path / name}.partial: resuming after {images} of 5 images." if images else "")
    assert (tmp_path / name).read_bytes() == expected[name]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_image_gives_the_empty_list(tmp_path: Path) -> None:
    with PartialResults(tmp_path / "out.json", IDENTITY, [], content, {}) as partial:
        partial.finish()
    write_results(tmp_path / "all.json", Results.concat([]))
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "all.json").read_bytes()


# ---- What a kill, a full disk or a failing one leaves. ----


def finished(path: Path, left: bytes, **identity: str) -> int:
    """Go on from what is left of a journal; how many images were taken over."""
    partial_path(path).write_bytes(left)
    done, _ = work(path, **identity)
    assert list(path.parent.iterdir()) == [path]
    return done


def test_cut_anywhere_the_whole_images_are_used_and_no_byte_differs(
    tmp_path: Path, expected: dict[str, bytes], journal: bytes
) -> None:
    ends = [match.start() for match in re.finditer(rb'[0-9a-f]{8} \{"image"', journal)] + [len(journal)]
    assert len(ends) == 5
    for length in range(len(journal) + 1):
        assert finished(tmp_path / "out.json", journal[:length]) == sum(end <= length for end in ends[1:])
        assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


@SETTINGS
@given(at=st.integers(min_value=0), flip=st.integers(1, 255), more=st.binary(max_size=40))
def test_damaged_anywhere_no_byte_differs(
    tmp_path: Path, expected: dict[str, bytes], journal: bytes, at: int, flip: int, more: bytes
) -> None:
    damaged = bytearray(journal)
    at = len(MAGIC) + at % (len(journal) - len(MAGIC))
    damaged[at] ^= flip
    assert finished(tmp_path / "out.json", bytes(damaged) + more) < 4
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]
    assert finished(tmp_path / "out.json", journal + more) == 4
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


def block(line: bytes) -> bytes:
    """A block of no records whose checksum is right."""
    return b"%08x %s" % (zlib.crc32(line + b"\n\n"), line + b"\n\n")


@pytest.mark.parametrize(
    "wrong",
    [
        block(b'{"image":5,"content":"pixels of 5","records":0,"size":-1,"counts":{"images":5,"boxes":6}}'),
        block(b'{"image":5,"content":"pixels of 5","records":0,"size":99999999999999,"counts":{"images":5,"boxes":6}}'),
        block(b'{"image":5,"content":"pixels of 5","records":0,"size":0,"counts":{"images":5}}'),
        block(b'{"image":5,"content":"pixels of 5","records":0,"size":0,"counts":{"images":5,"boxes":6,"more":1}}'),
        block(b'{"image":5,"content":"pixels of 5","records":0,"size":0,"counts":{"images":"5","boxes":6}}'),
        block(b'{"image":4,"content":"pixels of 4","records":0,"size":0,"counts":{"images":5,"boxes":6}}'),
        block(b'{"image":5,"content":"other","records":0,"size":0,"counts":{"images":5,"boxes":6}}'),
        block(b'{"image":5}'),
        block(b"[]"),
        block(b"\xff"),
        block(b"[" * 100_000),
        b"x" * (3 << 20),
        b"\n" * 9,
        b"-0000001 {}\n\n",
    ],
    ids=range(14),
)
def test_what_is_no_block_of_the_next_image_is_not_used(
    tmp_path: Path, expected: dict[str, bytes], journal: bytes, wrong: bytes
) -> None:
    assert finished(tmp_path / "out.json", journal + wrong) == 4
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


def test_a_right_block_is_one(tmp_path: Path, expected: dict[str, bytes], journal: bytes) -> None:
    right = b'{"image":5,"content":"pixels of 5","records":0,"size":0,"counts":{"images":5,"boxes":6}}'
    assert finished(tmp_path / "out.json", journal + block(right)) == 5
    assert finished(tmp_path / "out.json", journal + block(right) + block(right)) == 5  # more than there are images
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


@pytest.mark.parametrize("step", ["records", "line", "replace"])
def test_a_disk_that_is_full_loses_no_image_that_is_done(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "replace":
        monkeypatch.setattr(os, "replace", full)
    else:
        room = [600 if step == "records" else 380]
        write = resumable.write

        def written(journal: FileIO, data: bytes) -> None:
            write(journal, data[: room[0]])
            room[0] -= len(data)
            if room[0] < 0:
                full()

        monkeypatch.setattr(resumable, "write", written)
    with pytest.raises(OSError, match="No space left"):
        work(tmp_path / "out.json")
    monkeypatch.undo()
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["out.json.partial"]
    done, note = work(tmp_path / "out.json")
    assert done == {"records": 2, "line": 1, "replace": 5}[step]
    assert "resuming after" in note
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


def test_a_run_that_fails_before_its_first_image_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        work(tmp_path / "out.json", 0)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_refused_and_the_images_before_are_kept(tmp_path: Path) -> None:
    ids = np.ones(1, np.int64)
    wrong = Results(ids, ids, np.ones((1, 4)), np.array([np.nan]))

    def fails() -> None:
        with opened(tmp_path / "out.json") as partial:
            partial.add(part(IMAGES[0]), {"images": 1, "boxes": 2})
            partial.add(wrong, {"images": 2, "boxes": 3})

    with pytest.raises(DataError, match="score is not finite"):
        fails()
    with opened(tmp_path / "out.json") as partial:
        assert (partial.done, partial.records, partial.counts) == (1, 2, {"images": 1, "boxes": 2})
        assert partial.left() == (
            f"{tmp_path}/out.json was not written; 1 of 5 images are kept in {tmp_path}/out.json.partial. The same "
            "command goes on from there."
        )


def test_a_journal_damaged_while_it_is_read_back_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    with opened(path) as partial:
        for number, image in enumerate(IMAGES, 1):
            partial.add(part(image), {"images": number, "boxes": 0})
        data = bytearray(partial_path(path).read_bytes())
        data[data.rindex(b'"content"') + 3] ^= 1
        partial_path(path).write_bytes(data)
        with pytest.raises(DataError, match="damaged after image 4 of 5"):
            partial.finish()
    assert not path.exists()


# ---- What is of another run, or no journal at all. ----


@pytest.mark.parametrize(
    ("identity", "differs"),
    [({"top": "4"}, "top"), ({"more": "x"}, "more"), ({"top": "4", "version": "2"}, "version, top")],
)
def test_another_run_begins_anew_and_says_what_differs(
    tmp_path: Path, expected: dict[str, bytes], identity: dict[str, str], differs: str
) -> None:
    stopped(tmp_path / "out.json", 3)
    done, note = work(tmp_path / "out.json", **identity)
    assert (done, note) == (0, f"{tmp_path}/out.json.partial is of another run ({differs} differ), and is replaced.")
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


def test_the_run_that_replaced_another_is_the_one_to_go_on_with(tmp_path: Path, expected: dict[str, bytes]) -> None:
    stopped(tmp_path / "out.json", 3)
    with pytest.raises(Stopped):
        work(tmp_path / "out.json", 2, top="4")
    left = partial_path(tmp_path / "out.json").read_bytes()
    done, note = work(tmp_path / "out.json")
    assert (done, "(top differ)" in note) == (0, True)
    assert finished(tmp_path / "out.json", left, top="4") == 2
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


@pytest.mark.parametrize(("changed", "images"), [(7, 0), (9, 2), (5, 4)])
def test_from_an_image_that_has_changed_on_all_are_done_anew(tmp_path: Path, changed: int, images: int) -> None:
    stopped(tmp_path / "out.json", 4)

    def now(image: Image) -> str:
        return "new pixels" if image.id == changed else content(image)

    assert work(tmp_path / "out.json", content=now)[0] == images


def test_an_image_that_cannot_be_read_is_an_error_and_nothing_is_lost(tmp_path: Path, journal: bytes) -> None:
    partial_path(tmp_path / "out.json").write_bytes(journal)

    def lost(image: Image) -> str:
        raise DataError(f"image {image.id} does not exist")

    with pytest.raises(DataError, match="image 7 does not exist"):
        opened(tmp_path / "out.json", lost)
    assert partial_path(tmp_path / "out.json").read_bytes() == journal


@pytest.mark.parametrize("left", [b"", MAGIC[:9], MAGIC, MAGIC + b"0123"])
def test_a_journal_that_was_hardly_begun_is_begun_anew(tmp_path: Path, expected: dict[str, bytes], left: bytes) -> None:
    assert finished(tmp_path / "out.json", left) == 0
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]


@pytest.mark.parametrize("foreign", [b"my notes", b"[]", b"iou", MAGIC[:9] + b"?", b"\0" * 100])
def test_a_foreign_file_of_that_name_stays(tmp_path: Path, foreign: bytes) -> None:
    if foreign == b"iou":
        foreign = b"iou-Refiner"
    path = partial_path(tmp_path / "out.json")
    path.write_bytes(foreign)
    with pytest.raises(ValueError, match=r"no such file\. Move it away"):
        opened(tmp_path / "out.json")
    assert path.read_bytes() == foreign


def test_links_pipes_and_folders_of_that_name_stay(tmp_path: Path) -> None:
    path = partial_path(tmp_path / "out.json")
    (tmp_path / "mine").write_bytes(b"")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="Move it away"):
        opened(tmp_path / "out.json")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="Move it away"):
        opened(tmp_path / "out.json")
    assert stat.S_ISFIFO(path.stat().st_mode)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        opened(tmp_path / "out.json")
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Create it first"):
        opened(tmp_path / "absent" / "out.json")


# ---- Two processes. ----

HOLDS = """
import sys, time
from pathlib import Path
from iou_refiner.coco import journal as locking
from iou_refiner.coco.journal import MAGIC
from iou_refiner.coco.resumable import PartialResults
with PartialResults(Path(sys.argv[1]), {}, [], str, {}):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes out.json."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out.json")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.communicate()


def test_two_processes_do_not_write_one_output(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    before = partial_path(tmp_path / "out.json").read_bytes()
    with pytest.raises(ValueError, match=r"Another process writes out\.json at this moment"):
        opened(tmp_path / "out.json")
    assert partial_path(tmp_path / "out.json").read_bytes() == before
    holder.kill()  # and what a killed process held is free
    holder.wait()
    assert work(tmp_path / "out.json")[0] == 0


def test_a_journal_that_is_gone_once_it_is_locked_is_not_written_to(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, path = locking._lock, partial_path(tmp_path / "out.json")
    calls = []

    def late(journal: FileIO, name: Path) -> None:
        calls.append(name)
        if len(calls) == 1:  # the process that had it is through between opening and locking
            path.unlink()
        if len(calls) == 2:  # and another one has begun
            path.unlink()
            path.write_bytes(b"")
        lock(journal, name)

    monkeypatch.setattr(locking, "_lock", late)
    work(tmp_path / "out.json")
    assert len(calls) == 3
    assert (tmp_path / "out.json").read_bytes() == expected["out.json"]
    monkeypatch.setattr(locking, "_lock", lambda *_: path.unlink())  # again and again
    with pytest.raises(ValueError, match="Another process writes"):
        opened(tmp_path / "out.json")
