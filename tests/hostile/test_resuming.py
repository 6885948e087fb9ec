"""`dump` and `rescore`, killed at any moment and called again: the bytes of an undisturbed run, and no image twice."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from iou_refiner import HeadConfig, IoUHead, save_head
from tests.hostile.files import Call, caller
from tests.kit.paths import ROOT
from tests.kit.toys import make_dataset

IMAGES = 12
DATA = ["--detector", "mine.py:detector", "--ann", "images/annotation.json", "--images", "images"]
COMMANDS = {
    "dump": ["dump", *DATA, "--top", "9"],
    "rescore": ["rescore", "dets.json", "--head", "head.safetensors", *DATA, "--max-candidates", "8"],
}
# Each image it is asked for leaves a line in the file `asked`; the sleep makes kills fall between and into images.
DETECTOR = f"""
    import os, tempfile, time
    from pathlib import Path
    from tests.kit.toys import ToyDetector, make_dataset

    class Slow(ToyDetector):
        def prepare(self, rgb):
            with open("asked", "a") as stream:
                stream.write("x")
            time.sleep(float(os.environ.get("SECONDS", 0)))
            return super().prepare(rgb)

    def detector():
        with tempfile.TemporaryDirectory() as folder:
            made = make_dataset(Path(folder), {IMAGES})[1]
        made.__class__ = Slow
        return made
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a detector, candidates of it, and a head."""
    folder = tmp_path_factory.mktemp("resuming")
    path, _ = make_dataset(folder / "images", IMAGES)
    (folder / "mine.py").write_text(textwrap.dedent(DETECTOR))
    torch.manual_seed(0)
    save_head(IoUHead((4, 4), (1, 2), HeadConfig(width=2, hidden=(4,), output_size=2)), folder / "head.safetensors")
    rows = [
        {"image_id": row["image_id"], "category_id": 1, "bbox": [x + shift, y, w, h], "score": 0.9 - 0.05 * shift}
        for row in json.loads(path.read_text())["annotations"]
        for shift in range(6)
        for x, y, w, h in [row["bbox"]]
    ]
    (folder / "dets.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


def asked() -> int:
    """How many images the detector was asked for since this was last called."""
    path = Path("asked")
    count = len(path.read_text()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


def start(words: list[str], seconds: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "iou_refiner", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SECONDS": str(seconds)},
    )  # fmt: skip


def wait_for(images: int, process: subprocess.Popen[str]) -> None:
    """Wait until the detector was asked for so many images."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if Path("asked").exists() and len(Path("asked").read_text()) >= images:
            return
        time.sleep(0.002)


def counts(out: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(out).items() if name != "output"}


@pytest.mark.parametrize("name", ["out.json", "out.json.gz"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_random_moments_the_next_call_ends_with_the_same_bytes(call: Call, command: str, name: str) -> None:
    words = COMMANDS[command]
    code, out, err = call(*words, "-o", f"undisturbed-{name}", "--json")
    assert code == 0, err
    expected, whole = Path(f"undisturbed-{name}").read_bytes(), asked()
    assert whole == IMAGES
    rng, taken_over = random.Random(f"{command} {name}"), 0
    for _ in range(2):
        process = start([*words, "-o", name], 0.02)
        wait_for(rng.randint(2, 4), process)
        time.sleep(rng.uniform(0, 0.04))
        process.kill()
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        assert not Path(name).exists()
        found = re.search(rf"{name}\.partial: resuming after (\d+) of {IMAGES} images\.", said)
        # All that the run before it was asked for is there, but for the image that it was at.
        assert int(found[1] if found else 0) in (max(taken_over - 1, 0), taken_over), said
        taken_over = int(found[1] if found else 0) + asked()
    code, again, err = call(*words, "-o", name, "--json")
    found = re.search(rf"resuming after (\d+) of {IMAGES} images", err)
    assert code == 0
    assert found
    assert int(found[1]) in (taken_over - 1, taken_over)
    assert asked() == IMAGES - int(found[1])
    assert Path(name).read_bytes() == expected
    assert counts(again) == counts(out)
    assert not list(Path().glob(f"{name}.partial*"))
    assert not list(Path().glob("*.tmp"))


@pytest.fixture(scope="module")
def journal(source: Path) -> bytes:
    """The journal of a dump that was killed; nothing in it says where the files are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        process = start([*COMMANDS["dump"], "-o", "out.json"], 0.05)
        wait_for(4, process)
        process.kill()
        process.communicate()
        Path("asked").unlink()
        content = Path("out.json.partial").read_bytes()
        Path("out.json.partial").unlink()
    return content


@pytest.fixture
def half(home: Path, journal: bytes) -> Path:
    """The same beside an output that is to come."""
    (home / "out.json.partial").write_bytes(journal)
    return Path("out.json.partial")


def edited(name: str, old: str, new: str) -> None:
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new, 1))


# What is changed between two calls -> what the second one says, and how many images it takes over (None: some).
CHANGES: dict[str, tuple[Any, list[str], str, int | None]] = {
    "nothing": (lambda: None, [], "resuming after", None),
    "the cache": (lambda: None, ["--cache", "c"], "of another run (precision differ)", 0),
    "an option": (lambda: None, ["--top", "8"], "of another run (top differ)", 0),
    "the seed": (lambda: None, ["--seed", "3"], "of another run (seed differ)", 0),
    "the annotation": (
        lambda: edited("images/annotation.json", '"rectangle"', '"square"'), [], "of another run (ann differ)", 0
    ),
    "the detector's code": (lambda: edited("mine.py", "SECONDS", "OTHER"), [], "detector's code differ", 0),
    "the detector's name": (
        lambda: None, ["--detector", "./mine.py:detector"], "of another run (detector differ)", 0
    ),
    "the first image": (lambda: Path("images/1.png").write_bytes(Path("images/9.png").read_bytes()), [], "", 0),
    "the second image": (
        lambda: Path("images/2.png").write_bytes(Path("images/9.png").read_bytes()), [], "resuming after 1 of", 1
    ),
    "its end": (lambda: os.truncate("out.json.partial", 700), [], "", 0),
    "all of it": (lambda: Path("out.json.partial").write_bytes(b""), [], "", 0),
    "garbage in it": (lambda: edited("out.json.partial", '"ann"', '"bnn"'), [], "is damaged, and is not used", 0),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_run_left_is_not_used(half: Path, call: Call, change: str) -> None:
    apply, more, message, taken_over = CHANGES[change]
    apply()
    words = list(COMMANDS["dump"])
    if more and more[0] in words:
        at = words.index(more[0])
        words[at : at + 2] = []
    words += more
    code, out, err = call(*words, "-o", "out.json", "--json")
    assert (code, message in err) == (0, True), err
    done = IMAGES - asked()
    assert done > 0 if taken_over is None else done == taken_over
    assert call(*words, "-o", "expected.json", "--json")[1].replace("expected", "out") == out
    assert Path("out.json").read_bytes() == Path("expected.json").read_bytes()
    assert not half.exists()


def test_two_processes_do_not_write_one_output(half: Path, call: Call) -> None:
    process = start([*COMMANDS["dump"], "-o", "out.json"], 0.5)
    wait_for(1, process)
    code, _, err = call(*COMMANDS["dump"], "-o", "out.json")
    assert (code, "Another process writes out.json at this moment" in err) == (2, True), err
    _, err = process.communicate(timeout=120)
    assert (process.returncode, "resuming after" in err) == (0, True), err
    code, _, _ = call(*COMMANDS["dump"], "-o", "expected.json")
    assert Path("out.json").read_bytes() == Path("expected.json").read_bytes()


def test_an_image_that_cannot_be_read_costs_no_other(home: Path, call: Call) -> None:
    whole = Path("images/7.png").read_bytes()
    Path("images/7.png").write_bytes(whole[:50])
    code, _, err = call(*COMMANDS["dump"], "-o", "out.json")
    assert code == 3
    assert "Image 7" in err
    assert "out.json was not written; 6 of 12 images are kept in out.json.partial. The same command" in err
    Path("images/7.png").write_bytes(whole)
    asked()
    code, _, err = call(*COMMANDS["dump"], "-o", "out.json")
    assert (code, asked(), "resuming after 6 of 12" in err) == (0, 6, True), err


@pytest.mark.parametrize("foreign", [b"my notes", b"{}"])
def test_a_file_of_the_users_is_not_taken_for_a_journal(call: Call, foreign: bytes) -> None:
    Path("out.json.partial").write_bytes(foreign)
    code, _, err = call(*COMMANDS["dump"], "-o", "out.json")
    assert (code, "out.json.partial" in err, "Move it away" in err) == (2, True, True), err
    assert Path("out.json.partial").read_bytes() == foreign
    os.link("images/annotation.json", "x.json.partial")
    code, _, err = call(*COMMANDS["dump"], "-o", "x.json")
    assert (code, "is also an input" in err) == (2, True), err


def test_what_stood_there_stays_until_all_images_are_done(half: Path, call: Call) -> None:
    Path("out.json").write_text("before")
    whole = Path("images/12.png").read_bytes()
    Path("images/12.png").write_bytes(whole[:50])
    assert call(*COMMANDS["dump"], "-o", "out.json", "--overwrite")[0] == 3
    assert Path("out.json").read_text() == "before"
    Path("images/12.png").write_bytes(whole)
    code, _, err = call(*COMMANDS["dump"], "-o", "out.json", "--overwrite")
    assert (code, "resuming after 11 of 12" in err) == (0, True), err
    assert json.loads(Path("out.json").read_text())


def test_a_dump_says_what_it_drops(call: Call) -> None:
    code, out, _ = call(*COMMANDS["dump"], "-o", "out.json", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["candidates"] == report["records"] + sum(report["dropped"].values())
    assert report["records"] == len(json.loads(Path("out.json").read_text()))
    assert report["dropped"]["beyond top"] > 0
    out = call(*COMMANDS["dump"], "-o", "b.json")[1]
    assert f"{report['records']:,} kept; {report['dropped']['beyond top']:,} dropped" in out
