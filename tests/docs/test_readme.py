"""What the README shows is what the package does."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from torchvision.models import detection

from iou_refiner import HeadConfig, IoUHead, save_head
from iou_refiner.cli import app
from tests.kit.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("iou-refiner")
]


def test_the_functions_run():
    (example,) = (block for language, block in BLOCKS if language == "python" and "prroi_pool(" in block)
    names: dict[str, object] = {}
    exec(example, names)
    assert tuple(names["pooled"].shape) == (2, 64, 7, 7)
    assert names["keep"].tolist() == [1]
    torch.testing.assert_close(names["scores"], torch.tensor([0.9]))  # the score of the cluster
    assert (names["result"].score >= names["result"].start_score).all()


def test_the_wrap_runs(monkeypatch, tmp_path):
    """As printed, with a detector of random weights in place of the download."""
    (example,) = (block for language, block in BLOCKS if language == "python" and "IoURefiner(" in block)
    assert len([line for line in example.splitlines() if line.strip()]) == 5
    detector = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.0, min_size=96, max_size=96
    ).eval()
    monkeypatch.setattr(detection, "fasterrcnn_resnet50_fpn_v2", lambda weights: detector)
    head = tmp_path / "runs" / "coco" / "head.safetensors"
    head.parent.mkdir(parents=True)
    save_head(IoUHead((256, 256), (32, 32), HeadConfig(width=2, hidden=(4,), output_size=2)), head)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"image": torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))}
    exec(example, names)
    assert set(names["result"]) == {"boxes", "labels", "scores", "ious"}


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one(line: str):
    words = shlex.split(line, comments=True)[1:]
    command, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
    assert command.__name__.strip("_") == words[0]


def test_there_are_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} >= {"train", "dump", "rescore", "eval"}


def test_ci_runs_the_first_two_commands_as_printed():
    """What a newcomer types first is what CI types, in fresh clones and environments of its own."""
    first = next(block for language, block in BLOCKS if language == "bash")
    printed = [line.partition("#")[0].strip() for line in first.splitlines()]
    run = re.findall(r"^start \w+ as_a_newcomer \w+ '(.*)'$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert printed == run
    assert [line.partition(" && ")[2] for line in printed] == ["iou-refiner demo", "pytest"]
