"""`train --detections` and `rescore` as they are meant: results files and an annotation, no detector, no images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iou_refiner.coco import GroundTruth, Results, read_results, write_results
from tests.kit import fixtures
from tests.kit.crowds import make_saved


def save(folder: Path, name: str, saved: tuple[Results, GroundTruth]) -> None:
    results, truth = saved
    write_results(folder / f"{name}.json", results)
    (folder / f"{name}_ann.json").write_text(json.dumps(truth.to_coco_dict()))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for seed, (name, images) in enumerate({"train": 40, "val": 12, "test": 12}.items()):
        save(folder, name, make_saved(images, seed=seed))
    return folder


run = fixtures.run


TRAIN = ("train", "--detections", "train.json", "--ann", "train_ann.json")
VAL = ("--val-detections", "val.json", "--val-ann", "val_ann.json")


@pytest.fixture
def head(home, run) -> Path:
    path = home / "run" / "head.safetensors"
    if not path.exists():
        status, out, err = run(*TRAIN, *VAL, "-o", "run")
        assert status == 0, err
        assert "val_AP_chosen" in out
        assert "val AP" in err
    return path


def test_results_come_out_better_without_a_detector(home, run, head):
    status, out, err = run("rescore", "test.json", "--head", head, "-o", "better.json", "--json")
    assert status == 0, err
    said = json.loads(out)
    records, better = read_results(home / "test.json"), read_results(home / "better.json")
    assert said["records"] == len(better) > 0
    assert said["candidates"] == len(records) == said["detections"] + said["suppressed"] + sum(said["dropped"].values())
    assert set(better.image_id.tolist()) == set(records.image_id.tolist())
    plain = run("rescore", "test.json", "--head", head, "--preset", "detector_only", "-o", "plain.json")
    assert plain[0] == 0, plain[2]
    status, out, err = run(
        "eval", "better.json", "--baseline", "plain.json", "--ann", "test_ann.json", "--bootstrap", "0", "--json"
    )
    assert status == 0, err
    metrics = json.loads(out)
    assert metrics["after"]["metrics"]["AP"] > metrics["before"]["metrics"]["AP"]


def test_the_same_bytes_come_out_twice(home, run, head):
    for name in ("first.json", "second.json"):
        assert run("rescore", "test.json", "--head", head, "-o", name)[0] == 0
    assert (home / "first.json").read_bytes() == (home / "second.json").read_bytes()


def test_the_head_describes_itself(run, head):
    status, out, _ = run("info", head, "--json")
    about = json.loads(out)
    assert status == 0
    assert about["architecture"] == {}
    assert about["siblings"]["nms_threshold"] == 0.7
    assert about["recommended"]["siblings"] in (True, False)
    assert "sibling_move" in run("info", head)[1]


def test_boxes_after_suppression_are_refused_in_words(home, run, head):
    assert run("rescore", "test.json", "--head", head, "--preset", "detector_only", "-o", "after.json")[0] == 0
    status, _, err = run("rescore", "after.json", "--head", head, "-o", "again.json")
    assert status == 3
    assert "after suppression" in err
    assert "iou-refiner dump" in err
    assert not (home / "again.json").exists()
    assert run("rescore", "after.json", "--head", head, "-o", "again.json", "--no-check")[0] == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--images", "."), "--images"),
        (("--detector", "a.py:b"), "--detector"),
        (("--epochs", "3"), "Training"),
        (("--val-ann", "val_ann.json"), "--val-detections"),
    ],
)
def test_what_does_not_belong_to_it_is_refused(run, words, named):
    status, _, err = run(*TRAIN, "-o", "other", *words)
    assert status == 2
    assert named in err


def test_without_anything_to_train_on_both_ways_are_named(run):
    status, _, err = run("train", "--ann", "train_ann.json", "-o", "other")
    assert status == 2
    assert "--detector" in err
    assert "--detections" in err
