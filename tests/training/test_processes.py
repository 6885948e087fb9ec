"""One process and many train the same head, to the last bit; what dies is gone on with by any number of them."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path

import pytest

from tests.kit.processes import finish, run, start
from tests.kit.toys import make_dataset

WORDS = [
    "-m", "iou_refiner", "train", "--detector", "toy.py:detector", "--ann", "images/annotation.json",
    "--images", "images", "--width", "4", "--hidden", "16", "--epochs", "2", "--views", "2",
    "--boxes-per-image", "16", "--batch-size", "4", "--class-aware",
]  # fmt: skip
DETECTOR = """
from pathlib import Path
from tests.kit.toys import make_dataset

def detector():
    return make_dataset(Path("again"), 7)[1]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Seven images: batches of four views that no number of processes divides evenly, the last of two."""
    folder = tmp_path_factory.mktemp("processes")
    make_dataset(folder / "images", 7)
    make_dataset(folder / "again", 7)
    (folder / "toy.py").write_text(DETECTOR)
    run(1, [*WORDS, "-o", "one", "--cache", "none"], folder)
    return folder


def digest(home: Path, name: str) -> str:
    return hashlib.sha256((home / name / "head.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(("count", "cache"), [(2, "shared"), (3, "none"), (5, "none")])
def test_the_bytes_are_those_of_one_process(home, count, cache):
    ended = run(count, [*WORDS, "-o", f"{count}", "--cache", cache], home)
    assert digest(home, f"{count}") == digest(home, "one")
    # The first speaks for all, and the cache is filled once.
    assert ended[0].out.startswith(f"{count}/head.safetensors: epoch 2")
    assert [process.out for process in ended[1:]] == [""] * (count - 1)
    assert "Features of 14 views" in ended[0].err or cache == "none"
    assert not any("Features of" in process.err for process in ended[1:])
    assert len(list((home / "shared").glob("*.safetensors"))) == 14 or cache == "none"


def test_one_that_is_killed_ends_the_run_and_a_second_call_with_another_number_ends_alike(home):
    running = start(3, [*WORDS, "-o", "cut", "--cache", "none", "--checkpoint-minutes", "1e-9"], home)
    kept, patience = home / "cut" / "last.pt", time.monotonic() + 200
    while not kept.exists() and time.monotonic() < patience:
        time.sleep(0.01)
    running[1].kill()
    ended = finish(running)
    assert [process.code for process in ended] == [1, -signal.SIGKILL, 1]
    assert "Process 2 of 3 waits for another one in vain" in ended[2].err
    before = kept.read_bytes()
    run(2, [*WORDS, "-o", "cut", "--cache", "none", "--resume"], home)
    assert kept.read_bytes() != before
    assert digest(home, "cut") == digest(home, "one")
