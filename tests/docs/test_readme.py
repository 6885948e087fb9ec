"""What the README and the pages of the documentation show is what the package does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import detection

import iou_refiner
from iou_refiner import HeadConfig, IoUHead, TrainSettings, load_head, save_head
from iou_refiner.cli import app
from iou_refiner.coco import Results, read_ground_truth, write_results
from iou_refiner.detector.sources import feature_source
from iou_refiner.rescoring import dump_candidates
from iou_refiner.verbs.train import train as own_train
from tests.kit.needs import needs_package
from tests.kit.paths import ROOT
from tests.kit.toys import ToyDetector, make_dataset

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def block(page: str, sign: str) -> str:
    """The one Python block of a page that has this in it."""
    (text,) = (text for text in blocks(page, "python") if sign in text)
    return text


COMMANDS = [
    line
    for page in PAGES
    for text in blocks(page, "bash")
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("iou-refiner")
]


def test_the_pieces_run():
    names: dict[str, object] = {}
    exec(block("functions.md", "prroi_pool("), names)
    assert tuple(names["pooled"].shape) == (2, 64, 7, 7)
    assert names["keep"].tolist() == [1]
    torch.testing.assert_close(names["scores"], torch.tensor([0.9]))  # the score of the cluster
    assert (names["result"].score >= names["result"].start_score).all()


def test_boxes_go_into_and_out_of_other_packages():
    needs_package("supervision", install="pip install -e '.[supervision]'")
    names: dict[str, object] = {}
    exec(block("functions.md", "to_supervision("), names)
    assert len(names["sure"]) == 1
    assert {name: values.shape for name, values in names["arrays"].items()} == {
        "boxes": (2, 4), "scores": (2,), "labels": (2,), "ious": (2,),
    }  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyDetector:
    """A folder with the files that the pages name, in which the blocks run; the detector to them."""
    ann, detector = make_dataset(tmp_path / "train", 8)
    for name in ("test", "images"):
        (tmp_path / name).symlink_to(tmp_path / "train")
    for name in ("train.json", "test.json", "my_val.json"):
        (tmp_path / name).write_text(ann.read_text())
    truth = read_ground_truth(ann)
    candidates = Results.concat(dump_candidates(feature_source(detector, tmp_path / "train"), None, truth))
    for name in ("candidates.json", "before.json", "after.json"):
        write_results(tmp_path / name, candidates)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    small = TrainSettings(epochs=1, batch_size=4, boxes_per_image=8, views=1)

    def train(*args, **kwargs):
        return own_train(*args, **kwargs, config=HeadConfig(width=2, hidden=(4,), output_size=2), settings=small)

    monkeypatch.setattr(iou_refiner, "train", train, raising=False)
    return detector


def test_the_verbs_run(place: ToyDetector, capsys: pytest.CaptureFixture[str]):
    """As printed, on a small data set in place of the reader's, with a small head."""
    exec(block("functions.md", "trained = "), {"detector": place})
    assert "95 % interval" in capsys.readouterr().out
    assert "<script>" in Path("report.html").read_text()
    exec(block("README.md", "trained = "), {"detector": place, "iou_refiner": iou_refiner})
    assert len(json.loads(Path("better.json").read_text())) > 0
    assert load_head("runs/mine/head.safetensors").metadata.fingerprint == place.fingerprint()


def test_the_report_runs(place: ToyDetector, capsys: pytest.CaptureFixture[str]):
    exec(block("report.md", "iou_refiner.report("), {})
    assert capsys.readouterr().out.startswith("AP ")


def test_the_first_block_prints_what_is_shown(place: ToyDetector, capsys: pytest.CaptureFixture[str]):
    """The same rows and columns, on a small data set in place of the demo's: numbers are those of the demo."""
    Path("demo/data").mkdir(parents=True)
    for name in ("before.json", "after.json"):
        Path(name).rename(f"demo/{name}")
    Path("test.json").rename("demo/data/test.json")
    for image in Path("train").glob("*.png"):
        (Path("demo/data") / image.name).symlink_to(image.resolve())
    exec(block("README.md", "demo/after.json"), {})
    out = capsys.readouterr().out.splitlines()
    shown = next(text for text in blocks("README.md", "text") if "95 % interval" in text).splitlines()
    assert [line.split()[0] for line in out] == [line.split()[0] for line in shown]
    assert out[0].split() == shown[0].split()
    number = re.compile(r"[+-]?\d+\.\d")
    for line in shown[1:]:
        numbers = [float(text) for text in number.findall(line)]
        if not numbers:  # no such object among those of the demo
            assert line.split()[1:] == ["-"] * 4
            continue
        before, after, difference, low, high = numbers
        assert low <= difference <= high
        assert difference == pytest.approx(after - before, abs=0.11)  # each is rounded
    assert "No difference" in Path("demo/report.html").read_text()


def test_the_wrap_runs(monkeypatch, tmp_path):
    """As printed, with a detector of random weights in place of the download."""
    example = block("README.md", "IoURefiner(")
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    detector = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.0, min_size=96, max_size=96
    ).eval()
    monkeypatch.setattr(detection, "fasterrcnn_resnet50_fpn_v2", lambda weights: detector)
    head = tmp_path / "runs" / "features" / "head.safetensors"
    head.parent.mkdir(parents=True)
    save_head(IoUHead((256, 256), (32, 32), HeadConfig(width=2, hidden=(4,), output_size=2)), head)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"image": torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))}
    exec(example, names)
    assert set(names["result"]) == {"boxes", "labels", "scores", "ious"}
    assert np.isfinite(iou_refiner.to_numpy(names["result"])["ious"]).all()


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one(line: str):
    words = shlex.split(line, comments=True)[1:]
    command, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert command.__name__.strip("_") == words[0]


def test_there_are_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"train", "dump", "rescore", "eval", "report"}


def test_ci_runs_the_first_two_commands_as_printed():
    """What a newcomer types first is what CI types, in fresh clones and environments of its own."""
    first = blocks("README.md", "bash")[0]
    printed = [line.partition("#")[0].strip() for line in first.splitlines()]
    run = re.findall(r"^start \w+ as_a_newcomer \w+ '(.*)'$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert printed == run
    assert [line.partition(" && ")[2] for line in printed] == ["iou-refiner demo", "pytest"]


def test_it_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 100
