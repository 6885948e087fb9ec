from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from iou_refiner import DataError, IoUPredictor, fit
from iou_refiner.boxes import pairwise_iou
from iou_refiner.coco import read_ground_truth
from iou_refiner.detector.features import extract_image
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.checkpoint import read_metadata
from iou_refiner.stage.stage import Stage
from iou_refiner.training.loop import measure
from iou_refiner.training.losses import total_loss
from iou_refiner.training.recipe import train_head
from iou_refiner.training.samples import TrainingSet, sample_boxes, true_iou
from tests.kit.toys import make_dataset

HEAD = {"width": 4, "hidden": (32,), "output_size": 5}
SETTINGS = {"epochs": 2, "batch_size": 4, "boxes_per_image": 24, "lr": 3e-3}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    path, detector = make_dataset(folder, 12)
    truth = read_ground_truth(path)
    cache = FeatureCache(folder / "cache", detector)
    for view in range(3):
        list(cache.fill(folder, truth.images, view=view))
    return folder, truth, detector, cache


def head(seed: int = 0, **settings) -> IoUPredictor:
    torch.manual_seed(seed)
    return IoUPredictor((4, 4), (1, 2), **(HEAD | settings))


class TestCache:
    def test_it_gives_back_what_the_detector_saw(self, toy):
        folder, truth, detector, cache = toy
        seen, kept = extract_image(detector, folder, truth.images[0]), cache.load(truth.images[0].id)
        for a, b in zip(seen.features.levels, kept.features.levels, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=6e-4)  # float16
        assert torch.equal(seen.candidates.boxes, kept.candidates.boxes)
        assert seen.frame == kept.frame
        assert seen.features.image_sizes == kept.features.image_sizes

    def test_what_is_there_is_not_extracted_again(self, toy):
        folder, truth, _, cache = toy
        assert list(cache.fill(folder, truth.images)) == []

    def test_the_cache_of_another_detector_is_refused(self, toy, tmp_path):
        _, _, detector, cache = toy
        other = type(detector)(detector.objects)
        with torch.no_grad():
            other.weight.fill_(2.0)
        with pytest.raises(DataError, match="made with another detector"):
            FeatureCache(cache.folder, other)
        with pytest.raises(DataError, match="made with another dtype"):
            FeatureCache(cache.folder, detector, dtype="float32")

    def test_a_full_disk_is_said_before_it_fills(self, toy, tmp_path, monkeypatch):
        folder, truth, detector, _ = toy
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(DataError, match=r"needs about .* GB more"):
            list(FeatureCache(tmp_path, detector).fill(folder, truth.images))

    def test_a_damaged_entry_is_named(self, toy, tmp_path):
        folder, truth, detector, _ = toy
        cache = FeatureCache(tmp_path, detector)
        list(cache.fill(folder, truth.images[:1]))
        (tmp_path / "1.safetensors").write_bytes(b"nonsense")
        with pytest.raises(DataError, match="Image 1 cannot be read"):
            cache.load(1)

    def test_images_that_are_not_what_the_annotation_says(self, toy, tmp_path):
        folder, truth, detector, _ = toy
        image = truth.images[0]
        with pytest.raises(DataError, match="does not exist"):
            extract_image(detector, tmp_path, image)
        (tmp_path / image.file_name).write_bytes(b"no image")
        with pytest.raises(DataError, match="cannot be read"):
            extract_image(detector, tmp_path, image)
        wrong = type(image)(image.id, image.file_name, 99, image.height)
        with pytest.raises(DataError, match="64 x 64 pixels, its annotation says 99 x 64"):
            extract_image(detector, folder, wrong)


class TestTargets:
    def test_truth_is_the_best_object_of_the_same_class(self, toy):
        _, truth, _, cache = toy
        extraction, objects = TrainingSet(cache, truth).load(0)
        found = extraction.candidates
        expected = pairwise_iou(found.boxes, objects.boxes).amax(1)
        torch.testing.assert_close(true_iou(found.boxes, found.labels, objects), expected)
        assert true_iou(found.boxes, found.labels + 1, objects).max() == 0

    def test_views_come_with_their_own_objects(self, toy):
        """The pixels under the objects of every view are the bright ones, and those beside them are not."""
        _, truth, _, cache = toy
        data = TrainingSet(cache, truth, views=3)
        assert len(data) == 3 * len(truth.images)
        objects = 0
        for index in range(len(truth.images), len(data)):
            assert data.items[index] == (truth.images[index % len(truth.images)], index // len(truth.images))
            extraction, seen = data.load(index)
            bright = extraction.features.levels[0][0, 0] > 0.8
            for x1, y1, x2, y2 in seen.boxes.tolist():
                inside = bright[math.ceil(y1) + 1 : int(y2) - 1, math.ceil(x1) + 1 : int(x2) - 1]
                assert inside.all()
                bright[int(y1) : math.ceil(y2) + 1, int(x1) : math.ceil(x2) + 1] = False
                objects += 1
            for x1, y1, x2, y2 in seen.crowds.tolist():  # what is mostly cut off
                bright[int(y1) : math.ceil(y2) + 1, int(x1) : math.ceil(x2) + 1] = False
            assert bright.sum() == 0
        assert objects > 1.5 * len(truth.images)

    def test_crowds_are_not_judged(self, toy):
        _, truth, _, cache = toy
        extraction, objects = TrainingSet(cache, truth).load(0)
        found = extraction.candidates
        crowd = type(objects)(objects.boxes[:0], objects.labels[:0], torch.tensor([[0.0, 0, 64, 64]]))
        assert torch.isnan(true_iou(found.boxes, found.labels, crowd)).all()
        generator = torch.Generator().manual_seed(0)
        drawn = sample_boxes(extraction, crowd, 10, candidate_share=0.5, lowest_iou=0.3, generator=generator)
        assert len(drawn.iou) == 0

    def test_samples_cover_all_iou_and_carry_the_truth(self, toy):
        _, truth, _, cache = toy
        data, generator = TrainingSet(cache, truth), torch.Generator().manual_seed(0)
        drawn = []
        for index in range(len(data)):
            extraction, objects = data.load(index)
            samples = sample_boxes(extraction, objects, 200, candidate_share=0.2, lowest_iou=0.2, generator=generator)
            torch.testing.assert_close(samples.iou, true_iou(samples.boxes, samples.labels, objects))
            drawn.append(samples.iou)
        counts = torch.histc(torch.cat(drawn), 8, 0.2, 1.0)
        assert counts.min() > 0.5 * counts.max()

    def test_an_image_missing_from_the_cache_is_named(self, toy, tmp_path):
        _, truth, detector, _ = toy
        with pytest.raises(DataError, match=r"12 of 12 images are not in the feature cache \(first: image 1\)"):
            TrainingSet(FeatureCache(tmp_path, detector), truth)


class TestFit:
    @pytest.mark.parametrize("objective", ["bce", "smooth_l1"])
    @pytest.mark.parametrize("levels", [1, 3])
    def test_it_learns(self, toy, objective, levels):
        _, truth, _, cache = toy
        data, trained = TrainingSet(cache, truth), head(objective=objective, levels=levels)
        before = measure(trained, data)["mae"]
        history = fit(trained, data, val=data, **SETTINGS | {"epochs": 10})
        assert history[-1]["loss"] < 0.95 * history[0]["loss"]
        assert history[-1]["mae"] < 0.6 * before
        assert history[-1]["pearson"] > 0.5

    def test_boxes_and_loss_may_be_ones_own(self, toy):
        _, truth, _, cache = toy
        data, seen = TrainingSet(cache, truth), []

        def sample(extraction, objects, count, **settings):
            return sample_boxes(extraction, objects, count, **settings)[torch.tensor([0, 1])]

        def loss(head, read, asked, image_index):
            seen.append((len(asked.iou), image_index.unique().numel()))
            return total_loss(head, read, asked, image_index) * 0

        trained = head()
        before = {name: value.clone() for name, value in trained.state_dict().items() if name.startswith("output")}
        fit(trained, data, sample=sample, loss=loss, **SETTINGS | {"weight_decay": 0.0, "batch_size": 4})
        assert set(seen) == {(8, 4)}
        assert all(torch.equal(trained.state_dict()[name], value) for name, value in before.items())

    def test_same_seed_same_bytes(self, toy, tmp_path):
        _, truth, _, cache = toy
        data = TrainingSet(cache, truth, views=2)
        for name in "ab":
            fit(head(), data, output_dir=tmp_path / name, **SETTINGS)
        first, second = ((tmp_path / name / "head.safetensors").read_bytes() for name in "ab")
        assert first == second
        fit(head(), data, output_dir=tmp_path / "c", **SETTINGS, seed=1)
        assert (tmp_path / "c" / "head.safetensors").read_bytes() != first

    def test_stopped_and_resumed_ends_with_the_same_head(self, toy, tmp_path):
        _, truth, _, cache = toy
        data, settings = TrainingSet(cache, truth), SETTINGS | {"epochs": 3}
        fit(head(), data, output_dir=tmp_path / "whole", **settings)

        class Killed(Exception):
            pass

        def kill(step: int, total: int, loss: float) -> None:
            if step == total - 1:
                raise Killed

        with pytest.raises(Killed):
            fit(head(), data, output_dir=tmp_path / "cut", progress=kill, **settings)
        history = fit(head(seed=9), data, output_dir=tmp_path / "cut", resume=True, **settings)
        whole, cut = ((tmp_path / name / "head.safetensors") for name in ("whole", "cut"))
        weights = [IoUPredictor.load(path).state_dict() for path in (whole, cut)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert [m["epoch"] for m in history] == [1, 2, 3]
        lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]

    def test_resuming_with_other_settings_is_refused(self, toy, tmp_path):
        _, truth, _, cache = toy
        data = TrainingSet(cache, truth)
        fit(head(), data, output_dir=tmp_path, **SETTINGS)
        with pytest.raises(DataError, match="made with another epochs, lr"):
            fit(head(), data, output_dir=tmp_path, resume=True, **SETTINGS | {"lr": 1e-4, "epochs": 5})

    def test_the_detector_is_proven_frozen(self, toy):
        folder, truth, detector, _ = toy
        loose = type(detector)(detector.objects)
        cache = FeatureCache(folder / "loose", loose)
        list(cache.fill(folder, truth.images))

        def touch(step: int, total: int, loss: float) -> None:
            with torch.no_grad():
                loose.weight.add_(1.0)

        with pytest.raises(RuntimeError, match="weights changed"):
            fit(head(), TrainingSet(cache, truth), progress=touch, **SETTINGS | {"epochs": 1})

    def test_features_that_are_not_finite_stop_the_training_with_the_image(self, toy, tmp_path):
        folder, truth, detector, _ = toy
        cache = FeatureCache(tmp_path, detector)
        list(cache.fill(folder, truth.images))
        load = cache.load

        def poisoned(image_id: int, *, view: int = 0):
            extraction = load(image_id, view=view)
            if image_id == 7:
                extraction.features.levels[0].fill_(torch.nan)
            return extraction

        cache.load = poisoned
        with pytest.raises(DataError, match=r"loss is nan on images .*\b7\b"):
            fit(head(), TrainingSet(cache, truth), **SETTINGS)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [({"epochs": 0}, "`epochs`"), ({"candidate_share": 2}, "`candidate_share`"), ({"lr": float("nan")}, "`lr`")],
    )
    def test_wrong_settings_are_named(self, toy, wrong, message):
        _, truth, _, cache = toy
        with pytest.raises(ValueError, match=message):
            fit(head(), TrainingSet(cache, truth), **SETTINGS | wrong)


def test_train_head_from_images_to_file(toy, tmp_path):
    folder, truth, detector, _ = toy
    said: list[str] = []
    phases: set[str] = set()
    history = train_head(
        detector, (truth, folder), (truth, folder), output_dir=tmp_path, head=HEAD, class_aware=True, note=said.append,
        progress=lambda phase, done, total: phases.add(phase), **SETTINGS,
    )  # fmt: skip
    loaded = IoUPredictor.load(tmp_path / "head.safetensors")
    assert loaded.detector == detector.fingerprint()
    assert loaded.num_classes == 2
    data = TrainingSet(FeatureCache(tmp_path / "cache", detector), truth)
    assert history[-1]["pearson"] == pytest.approx(measure(loaded, data)["pearson"])
    assert "Features of 12 images: about 0.00 GB" in said[0]
    assert phases == {"extracting", *(f"extracting view {n}" for n in (1, 2, 3)), "training", "choosing settings"}
    # What was chosen is what measured best, and what a stage does with this head unless told otherwise.
    trials = read_metadata(tmp_path / "head.safetensors")["trials"]
    best = max(trials, key=lambda trial: trial["AP"])
    chosen = next(t for t in trials if {**t, "AP": 0, "AP50": 0} == {**loaded.recommended, "AP": 0, "AP50": 0})
    assert chosen["AP"] >= best["AP"] - 4 * 0.001
    assert Stage(loaded).settings.rank_alpha == loaded.recommended["rank_alpha"]
    assert Stage(loaded, rank_alpha=0.125, steps=None).settings.rank_alpha == 0.125
