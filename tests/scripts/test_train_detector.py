"""scripts/train_detector.py on rectangles, with its real network: what it learns from, leaves behind, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from iou_refiner import DataError, load_head
from iou_refiner.coco import read_ground_truth
from iou_refiner.detector.registry import detector_from_spec
from tests.kit import processes
from tests.kit.needs import DEV, needs_package
from tests.kit.paths import ROOT
from tests.kit.toys import SIZE, make_dataset

EPOCHS = 2


@pytest.fixture(scope="module")
def script(shared: Path) -> ModuleType:
    needs_package("efficientnet_lite_pytorch", install=DEV)  # the network's backbone
    from scripts import train_detector

    return train_detector


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("rectangles")
    annotation, _ = make_dataset(folder, 12)
    data = ["--ann", annotation, "--val-ann", annotation, "--images", folder]
    return [*map(str, data), "--size", str(SIZE), "--epochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def trained(script: ModuleType, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    script.main([*arguments, "--output", str(folder)])
    return folder


def weights(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_boxes_stay_on_what_they_enclose(script: ModuleType, tmp_path: Path) -> None:
    """In every view, to a pixel; a crowd is no object."""
    path, toy = make_dataset(tmp_path, 6)
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    truth = read_ground_truth(path)
    images = script.TrainingImages(toy, tmp_path, truth)
    distinct, largest = set(), 0
    for epoch in range(12):
        for index in range(len(images)):
            pixels, target = images.load(index, epoch)
            assert target["labels"].tolist() == [1] * len(target["boxes"])
            own = [a for a in content["annotations"] if a["image_id"] == index + 1 and not a["iscrowd"]]
            assert len(target["boxes"]) <= len(own)
            for box in target["boxes"]:
                left, top = (box[:2] - 2).clamp(min=0).round().int().tolist()
                right, bottom = (box[2:] + 2).round().int().tolist()
                y, x = torch.nonzero(pixels[0, top:bottom, left:right] > 0.5, as_tuple=True)
                inked = torch.stack([left + x.min(), top + y.min(), left + x.max() + 1, top + y.max() + 1])
                assert (inked - box).abs().max() <= 1
                distinct.add((index, *box.tolist()))
                largest = max(largest, float((box[2:] - box[:2]).max()))
    assert len(distinct) > 40  # two views of each would give 18
    assert largest > 30  # windows enlarge: 21 is the longest side drawn


def test_it_leaves_weights_of_every_epoch_and_the_best(trained: Path) -> None:
    epochs = [f"epoch-{n:02}.safetensors" for n in range(1, EPOCHS + 1)]
    assert sorted(p.name for p in trained.iterdir()) == ["best.safetensors", *epochs, "last.pt", "metrics.jsonl"]
    measured = metrics(trained)
    assert [entry["epoch"] for entry in measured] == [1, 2]
    assert measured[1]["loss"] < measured[0]["loss"]
    assert not same(*(weights(trained / name) for name in epochs))


def test_the_best_are_those_with_the_highest_ap(script: ModuleType, tmp_path: Path) -> None:
    detector = script.network(1, SIZE)
    adapter = script.TorchvisionAdapter(detector, longest_side=SIZE)
    training = script.Training(adapter, 4, 1e-3, tmp_path, {"size": SIZE})
    bias = detector.rpn.head.cls_logits.bias.data
    for epoch, ap in enumerate((0.1, 0.3, 0.2), 1):
        bias.fill_(epoch)
        training.save({"AP": ap})
    assert weights(tmp_path / "best.safetensors")["rpn.head.cls_logits.bias"].unique().tolist() == [2]
    assert weights(tmp_path / "epoch-03.safetensors")["rpn.head.cls_logits.bias"].unique().tolist() == [3]


def test_what_is_frozen_stays(script: ModuleType, trained: Path) -> None:
    start, end = script.network(1, SIZE).state_dict(), weights(trained / "epoch-02.safetensors")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert not {name for name in changed if "_conv_stem" in name or "running" in name or "m._blocks.0." in name}
    assert {"backbone.m._blocks.14._depthwise_conv.weight", "rpn.head.cls_logits.weight"} <= changed


def test_the_command_line_can_name_it(trained: Path) -> None:
    path = trained / "best.safetensors"
    adapter: Any = detector_from_spec(f"{ROOT / 'examples' / 'small_detectors.py'}:faster_rcnn:{path}")
    assert adapter.longest_side == SIZE
    assert adapter.detector.transform.max_size == SIZE
    assert same(adapter.detector.state_dict(), weights(path))


def test_a_stopped_run_goes_on_to_the_same_weights(
    script: ModuleType, arguments: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = script.Training.step, []

    def stopped(training: Any, *batch: Any) -> float:
        steps.append(len(steps))
        if len(steps) == 5:  # in the second epoch
            raise KeyboardInterrupt
        return float(step(training, *batch))

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            script.main([*arguments, "--output", str(tmp_path)])
    assert len(metrics(tmp_path)) == 1
    script.main([*arguments, "--output", str(tmp_path), "--resume"])
    assert [entry["AP"] for entry in metrics(tmp_path)] == [entry["AP"] for entry in metrics(trained)]
    assert same(weights(tmp_path / "epoch-02.safetensors"), weights(trained / "epoch-02.safetensors"))


def test_it_starts_from_weights(
    script: ModuleType, arguments: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.setattr(script, "train", lambda adapter, *_, **__: started.append(adapter.detector) or [])
    path = trained / "best.safetensors"
    script.main([*arguments, "--output", str(tmp_path), "--weights", str(path)])
    assert same(started[0].state_dict(), weights(path))


def test_nothing_is_replaced_and_no_settings_are_mixed(
    script: ModuleType, arguments: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main([*arguments, "--output", str(trained)])
    assert f"{trained} holds a training already. Add --resume" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"last\.pt was made with another seed"):
        script.main([*arguments, "--output", str(trained), "--resume", "--seed", "1"])
    with pytest.raises(ValueError, match="`lr` must be a finite number above 0"):
        script.main([*arguments, "--output", str(trained), "--lr", "0"])


def step_on(script: ModuleType, detector: Any, box: list[float], folder: Path) -> float:
    adapter = script.TorchvisionAdapter(detector.train(), longest_side=SIZE)
    target = {"boxes": torch.tensor([box]), "labels": torch.ones(1, dtype=torch.int64)}
    return float(script.Training(adapter, 4, 1e-3, folder, {}).step([torch.rand(3, SIZE, SIZE)], [target]))


def test_boxes_keep_their_precision(script: ModuleType, tmp_path: Path) -> None:
    """In bfloat16 this box has no width, and the deltas to it no logarithm."""
    box = [50.01, 8.0, 50.09, 40.0]
    assert torch.tensor(box).bfloat16().unique().tolist() == [8, 40, 50]
    assert 0 < step_on(script, script.network(1, SIZE), box, tmp_path) < 20


def test_a_loss_that_is_not_finite_is_reported(script: ModuleType, tmp_path: Path) -> None:
    detector = script.network(1, SIZE)
    detector.rpn.head.cls_logits.bias.data.fill_(torch.nan)
    with pytest.raises(DataError, match="The loss is nan"):
        step_on(script, detector, [8.0, 8, 40, 40], tmp_path)


# --- together with a head --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(script: ModuleType, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint")
    script.main([*arguments, "--output", str(folder), "--joint"])
    return folder


def test_a_head_of_every_epoch_and_of_the_best_belongs_to_the_detector_beside_it(joint: Path) -> None:
    best = (joint / "best.safetensors").read_bytes()
    for name in ("01", "02"):
        adapter: Any = detector_from_spec(
            f"{ROOT / 'examples' / 'small_detectors.py'}:faster_rcnn:{joint / f'epoch-{name}.safetensors'}"
        )
        head = load_head(joint / f"head-{name}.safetensors")
        assert head.metadata.fingerprint == adapter.fingerprint()
        assert [category.name for category in head.metadata.categories] == ["rectangle"]
        if (joint / f"epoch-{name}.safetensors").read_bytes() == best:
            assert load_head(joint / "head.safetensors").metadata.fingerprint == adapter.fingerprint()


def test_the_head_learns_with_it(joint: Path, trained: Path) -> None:
    first, last = (weights(joint / f"head-{name}.safetensors") for name in ("01", "02"))
    assert all(not torch.equal(first[name], last[name]) for name in first)
    assert not same(weights(joint / "epoch-02.safetensors"), weights(trained / "epoch-02.safetensors"))


def test_a_stopped_joint_run_goes_on_to_the_same_weights(
    script: ModuleType, arguments: list[str], joint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = script.Training.step, []

    def stopped(training: Any, *batch: Any) -> float:
        steps.append(len(steps))
        if len(steps) == 5:
            raise KeyboardInterrupt
        return float(step(training, *batch))

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            script.main([*arguments, "--output", str(tmp_path), "--joint"])
    script.main([*arguments, "--output", str(tmp_path), "--joint", "--resume"])
    for name in ("epoch-02.safetensors", "head-02.safetensors"):
        assert (tmp_path / name).read_bytes() == (joint / name).read_bytes()
    with pytest.raises(DataError, match=r"last\.pt was made with another joint"):
        script.main([*arguments, "--output", str(tmp_path), "--resume"])


def test_in_two_processes(arguments: list[str], script: ModuleType, tmp_path: Path) -> None:
    words = ["-m", "scripts.train_detector", *arguments, "--output", str(tmp_path / "two"), "--joint"]
    first, second = processes.run(2, words, tmp_path)
    assert "epoch 2" in first.err + first.out
    assert "epoch" not in second.err + second.out
    assert [entry["epoch"] for entry in metrics(tmp_path / "two")] == [1, 2]
    assert metrics(tmp_path / "two")[1]["loss"] < metrics(tmp_path / "two")[0]["loss"]
