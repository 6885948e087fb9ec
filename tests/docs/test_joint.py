"""docs/joint.md and the example it names run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples import joint_training
from iou_refiner import IoURefiner
from tests.adapters.cases_torchvision import BUILDERS, tiny
from tests.adapters.test_joint_loop import images, targets
from tests.kit.paths import ROOT
from tests.kit.toys import make_dataset


def test_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "joint.md").read_text(), re.S)
    names = {
        "detector": tiny("faster_rcnn").detector, "another_detector": BUILDERS["faster_rcnn"](),
        "images": images(), "targets": targets(),
    }  # fmt: skip
    exec(compile(block, "docs/joint.md", "exec"), names)
    assert {"loss_iou", "loss_iou_ranking", "loss_iou_deltas"} < names["losses"].keys()
    assert isinstance(names["refined"], IoURefiner)


def test_the_example(tmp_path: Path) -> None:
    ann, _ = make_dataset(tmp_path, 2)
    refiner = joint_training.train(
        ann, ann.parent, tmp_path / "both", epochs=1, lr=1e-4, pretrained=False
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["detector.safetensors", "head.safetensors"]
    assert refiner.head.metadata.fingerprint == refiner.adapter.fingerprint()
