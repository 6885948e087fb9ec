"""The whole training in one call, from a detector and annotated images to a head and its settings."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from iou_refiner import HeadConfig, Stage, StageSettings, TrainSettings, load_head
from iou_refiner.coco import read_ground_truth
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.config import TrainedCategory
from iou_refiner.training.loop import measure
from iou_refiner.training.recipe import train
from iou_refiner.training.samples import TrainingSet
from tests.kit.toys import make_dataset

CONFIG = HeadConfig(width=4, hidden=(32,), output_size=5)
SETTINGS = TrainSettings(epochs=2, batch_size=4, boxes_per_image=24, lr=3e-3)


def from_images_to_file(tmp_path, **options):
    """A training run on twelve images, which are those measured on as well."""
    folder = tmp_path / "images"
    path, detector = make_dataset(folder, 12)
    truth = read_ground_truth(path)
    history = train(
        detector, (truth, folder), (truth, folder), output_dir=tmp_path / "run", cache=tmp_path / "run" / "cache",
        config=CONFIG, settings=SETTINGS, **options,
    )  # fmt: skip
    return truth, detector, history


def test_from_images_to_file(tmp_path):
    said: list[str] = []
    phases: list[tuple[str, int, int]] = []
    truth, detector, history = from_images_to_file(
        tmp_path, class_aware=True, note=said.append, progress=lambda *told: phases.append(told)
    )
    loaded = load_head(tmp_path / "run" / "head.safetensors")
    assert loaded.config == CONFIG
    assert loaded.metadata.fingerprint == detector.fingerprint()
    assert loaded.metadata.detector_name == "ToyDetector"
    assert loaded.metadata.training == {**asdict(SETTINGS), "seed": 0, "images": 12 * SETTINGS.views}
    assert loaded.num_classes == 2
    assert loaded.metadata.categories == (TrainedCategory(1, "rectangle", 1),)
    assert "validation set is small (12 images, about 100 or more are needed)" in said[-2]
    assert said[-1].startswith("val AP ")
    for name in ("val_AP_detector", "val_AP_chosen", "val_AP_gain_low"):
        assert history[-1][name] == loaded.metadata.metrics[name]
    data = TrainingSet(FeatureCache(tmp_path / "run" / "cache", detector).of(tmp_path / "images"), truth)
    assert history[-1]["pearson"] == pytest.approx(measure(loaded, data)["pearson"])
    assert loaded.metadata.metrics["pearson"] == history[-1]["pearson"]
    assert "Features of 60 views of images: about 0.00 GB" in said[0]
    names = ["extracting", "training", "looking at siblings", "training on siblings", "choosing settings"]
    assert list(dict.fromkeys(phase for phase, _, _ in phases)) == names
    for name in names:
        counts = [(done, total) for phase, done, total in phases if phase == name]
        assert counts == [(step + 1, len(counts)) for step in range(len(counts))]
    # What was chosen is what measured best, and what a stage does with this head unless told otherwise.
    trials, recommended = loaded.metadata.trials, loaded.metadata.recommended
    best = max(trials, key=lambda trial: trial["AP"])
    chosen = next(t for t in trials if {**t, "AP": 0, "AP50": 0} == {**recommended, "AP": 0, "AP50": 0})
    assert chosen["AP"] >= best["AP"] - 4 * 0.001
    assert Stage(loaded).settings == StageSettings(**recommended)
    assert Stage(loaded, rank_alpha=0.125, ascent_steps=None).settings.rank_alpha == 0.125


def test_a_run_that_is_through_resumes_to_the_same_bytes(tmp_path):
    from_images_to_file(tmp_path)
    path = tmp_path / "run" / "head.safetensors"
    before = path.read_bytes()
    _, _, history = from_images_to_file(tmp_path, resume=True)
    assert len(history) == 2
    assert path.read_bytes() == before


def test_without_val_nothing_is_recommended(tmp_path):
    path, detector = make_dataset(tmp_path / "images", 3)
    truth = read_ground_truth(path)
    settings = replace(SETTINGS, views=1, epochs=1)
    train(
        detector, (truth, tmp_path / "images"), output_dir=tmp_path / "run", cache=tmp_path / "cache", config=CONFIG,
        settings=settings, note=lambda text: None,
    )  # fmt: skip
    loaded = load_head(tmp_path / "run" / "head.safetensors")
    assert loaded.metadata.recommended == {}
    assert loaded.metadata.trials == ()
    assert loaded.num_classes == 0
    assert Stage(loaded).settings == StageSettings.by_siblings()
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"head.safetensors", "last.pt", "metrics.jsonl"}
