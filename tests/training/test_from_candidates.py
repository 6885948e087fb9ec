"""A head from saved candidates alone: trained, chosen on val, used on others; and what it cannot be made from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.head.checkpoint import load_head
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.rescoring import rescore_saved, saved_candidates, saved_likeness
from iou_refiner.siblings.likeness import check_likeness
from iou_refiner.stage.nms import nms
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training import tuning
from iou_refiner.training.candidate_set import candidate_samples
from iou_refiner.training.from_candidates import train_from_candidates
from iou_refiner.training.sibling_settings import SiblingSettings
from tests.kit.crowds import SMALL, make_saved, opinionated
from tests.kit.scenes import make_results, make_truth

QUICK = SiblingSettings(epochs=1)


def suppressed(results: Results, threshold: float) -> Results:
    """What a greedy NMS leaves of each image."""
    parts = []
    for rows in results.by_image().values():
        image = saved_candidates(results[rows])
        parts.append(results[rows][nms(image.boxes, image.scores, image.labels, threshold=threshold).numpy()])
    return Results.concat(parts)


def silently(text: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head, what was said, and the history."""
    folder, said = tmp_path_factory.mktemp("head"), []
    history = train_from_candidates(
        make_saved(80), make_saved(40, seed=1), output_dir=folder / "new", config=SMALL,
        settings=SiblingSettings(epochs=8, lr=5e-3), detector_name="toy", note=said.append,
    )  # fmt: skip
    return load_head(folder / "new" / "head.safetensors"), said, history


def test_a_head_is_trained_and_chosen(trained: Any) -> None:
    head, said, history = trained
    assert isinstance(head, SiblingHead)
    about = head.metadata
    assert (about.detector_name, about.fingerprint) == ("toy", "")
    assert [(category.id, category.label) for category in about.categories] == [(1, 1)]
    assert about.recommended["siblings"]
    assert StageSettings().replace(**about.recommended).siblings
    assert about.training["images"] == 80
    assert about.training["nms_threshold"] in (0.5, 0.6, 0.65, 0.7)
    assert [trial["siblings"] for trial in about.trials] == [False] + [True] * 5
    assert about.trials[0]["nms_threshold"] == about.training["nms_threshold"]
    assert about.metrics["val_AP_chosen"] > about.metrics["val_AP_detector"] + 0.1
    assert about.metrics["val_AP_gain_low"] > 0
    assert history[-1]["val_AP_chosen"] == about.metrics["val_AP_chosen"]
    assert len(history) == 8
    assert any("The validation set is small (40 images" in line for line in said)
    assert about.candidates == saved_likeness(make_saved(80)[0], SMALL)
    assert about.candidates["crowd"] > 0.5


def test_it_gains_on_images_that_nobody_has_seen(trained: Any) -> None:
    head, _, _ = trained
    results, truth = make_saved(40, seed=2)
    own = StageSettings.detector_only(nms_threshold=head.metadata.training["nms_threshold"])
    after, before = (
        evaluate(Results.concat(rescore_saved(Stage(head, settings), results)), truth).metrics["AP"]
        for settings in (None, own)
    )
    assert after > before + 0.1


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    data, files = make_saved(12), []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        train_from_candidates(data, output_dir=folder, config=SMALL, settings=QUICK, seed=seed, note=silently)
        assert [file.name for file in folder.iterdir()] == ["head.safetensors"]
        files.append((folder / "head.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_without_val_nothing_is_chosen(tmp_path: Path) -> None:
    history = train_from_candidates(make_saved(12), output_dir=tmp_path, config=SMALL, settings=QUICK, note=silently)
    head = load_head(tmp_path / "head.safetensors")
    assert head.metadata.recommended == {}
    assert Stage(head).settings == StageSettings.by_siblings()
    assert not any(name.startswith("val") for name in history[-1])


@pytest.mark.parametrize("low", [-0.01, 0.0])
def test_where_the_gain_is_not_sure_the_detector_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: float
) -> None:
    monkeypatch.setattr(tuning, "compare", lambda *_, **__: SimpleNamespace(intervals={"AP": (low, 0.3)}))
    said: list[str] = []
    train_from_candidates(
        make_saved(12), make_saved(12, seed=1), output_dir=tmp_path, config=SMALL, settings=QUICK, note=said.append
    )
    head = load_head(tmp_path / "head.safetensors")
    own = StageSettings.detector_only(nms_threshold=head.metadata.training["nms_threshold"])
    assert head.metadata.recommended == asdict(own)
    assert Stage(head).settings == own
    assert head.metadata.metrics["val_AP_chosen"] == head.metadata.metrics["val_AP_detector"]
    assert "the detector's own behaviour is recommended" in said[-1]


# ---- What it cannot be made from, or used on. ----


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6])
def test_boxes_after_suppression_are_refused(tmp_path: Path, threshold: float) -> None:
    results, truth = make_saved(120)
    left = suppressed(results, threshold)
    message = rf"look already NMS-ed at about {threshold - 0.02:.1f}|look already NMS-ed at about {threshold:.2f}"
    with pytest.raises(DataError, match=message):
        train_from_candidates((left, truth), output_dir=tmp_path, config=SMALL, settings=QUICK, note=silently)
    assert list(tmp_path.iterdir()) == []
    train_from_candidates((left, truth), output_dir=tmp_path, config=SMALL, settings=QUICK, check=False, note=silently)
    assert (tmp_path / "head.safetensors").exists()


def other(results: Results, kind: str) -> Results:
    if kind == "scores of another range":
        return replace(results, score=results.score**4)
    if kind == "cut":
        return results[results.score > 0.4]
    return suppressed(results, 0.5)


@pytest.mark.parametrize("kind", ["scores of another range", "cut", "suppressed"])
def test_candidates_of_another_kind_are_refused(trained: Any, tmp_path: Path, kind: str) -> None:
    head, _, _ = trained
    check_likeness(head.metadata.candidates, saved_likeness(make_saved(40, seed=5)[0], SMALL), "new.json")
    results, truth = make_saved(40, seed=5)
    unlike = other(results, kind)
    message = "look like boxes after suppression" if kind == "suppressed" else "scores of another detector, or cut"
    with pytest.raises(DataError, match=rf"new\.json: .*{message}"):
        check_likeness(head.metadata.candidates, saved_likeness(unlike, SMALL), "new.json")
    data = make_saved(80), (unlike, truth)
    with pytest.raises(DataError, match=f"The validation candidates: .*{message}"):
        train_from_candidates(*data, output_dir=tmp_path, config=SMALL, settings=QUICK, note=silently)
    assert list(tmp_path.iterdir()) == []


def empty_truth() -> GroundTruth:
    return make_truth([1, 2], [1])


def crowds_only() -> GroundTruth:
    return make_truth([1], [1], [(1, 1, (0, 0, 50, 50), True)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: (make_results(), make_saved(3)[1]), "No image has a candidate to learn from"),
        (lambda: (make_saved(2)[0], empty_truth()), "no annotated objects in its 2 images"),
        (lambda: (make_saved(1)[0], crowds_only()), "are crowds"),
        (lambda: (make_saved(4)[0], make_saved(3)[1]), "Record .* no image 4 in the annotation"),
        (
            lambda: (replace(make_saved(3)[0], category_id=np.full(3 * 32, 9)), make_saved(3)[1]),
            "No image has a candidate to learn from",
        ),
    ],
)
def test_data_that_cannot_teach_is_named(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_from_candidates(data(), output_dir=tmp_path, config=SMALL, settings=QUICK, note=silently)
    assert list(tmp_path.iterdir()) == []


# ---- Saved candidates. ----


def test_the_samples_are_those_of_the_file_and_its_annotation() -> None:
    results, truth = make_saved(5)
    truth = replace(truth, iscrowd=np.arange(len(truth)) % 3 == 0)
    samples = candidate_samples(results, truth, SMALL, most=5)
    assert len(samples) == 5
    for image, (number, rows) in zip(samples, results.by_image().items(), strict=True):
        far = (results.bbox[rows, :2] + results.bbox[rows, 2:]).max(0)
        np.testing.assert_allclose(image.limits[0].numpy(), [*far, *far], rtol=1e-6)
        assert len(image.boxes) == len(rows)
        (targets,) = image.targets
        assert (len(targets.gt_boxes), len(targets.ignored_boxes)) == (2, 1)
        assert targets.gt_labels.tolist() == [1, 1]
        own = truth.bbox[(truth.image_id == number) & ~truth.iscrowd]
        np.testing.assert_allclose(targets.gt_boxes[:, :2].numpy(), own[:, :2], rtol=1e-6)
    few = candidate_samples(results, truth, SMALL, most=2)
    assert [len(few), *few[0].survivors] == [2, *samples[0].survivors]
    assert torch.equal(few[1].boxes, samples[4].boxes)  # spread over all


def test_categories_that_nobody_annotated_teach_nothing_and_still_show_how_far_the_image_reaches() -> None:
    results, truth = make_saved(2)
    category = np.where(np.arange(len(results)) % 4 == 0, 7, 1)
    mixed = replace(results, category_id=category)
    with_others = candidate_samples(mixed, truth, SMALL, most=9)
    without = candidate_samples(mixed[category == 1], truth, SMALL, most=9)
    everything = candidate_samples(results, truth, SMALL, most=9)
    for ours, alone, whole in zip(with_others, without, everything, strict=True):
        assert torch.equal(ours.boxes, alone.boxes)
        assert torch.equal(ours.limits[0], whole.limits[0])


def test_rescoring_a_file_is_rescoring_its_images_one_by_one() -> None:
    results, _ = make_saved(20)
    extra = tuple({"track": index, "segmentation": []} for index in range(len(results)))
    results = replace(results, extra=extra)[np.random.default_rng(0).permutation(len(results))]
    head = opinionated(SiblingHead(SMALL))
    stage = Stage(head)
    parts = list(rescore_saved(stage, results))
    assert [set(part.image_id.tolist()) for part in parts] == [{image} for image in results.by_image()]
    for part, rows in zip(parts, results.by_image().values(), strict=True):
        (alone,) = rescore_saved(Stage(head), results[rows])
        np.testing.assert_allclose(part.bbox, alone.bbox, atol=1e-2)
        np.testing.assert_allclose(part.score, alone.score, atol=1e-4)
        far = (results.bbox[rows, :2] + results.bbox[rows, 2:]).max(0)
        assert (part.bbox[:, :2] + part.bbox[:, 2:] <= far + 1e-3).all()
        assert part.extra is not None
        assert all(keys.keys() == {"track"} for keys in part.extra)
    counts = stage.summary
    assert (counts.images, counts.candidates, counts.detections) == (20, len(results), sum(map(len, parts)))


def test_records_without_a_size_are_counted() -> None:
    results, _ = make_saved(2)
    box = results.bbox.copy()
    box[0, 2:], box[1, :2], box[40, 2] = 0, -1000, np.nan
    stage = Stage(opinionated(SiblingHead(SMALL)))
    out = Results.concat(rescore_saved(stage, replace(results, bbox=box)))
    counts = stage.summary
    assert (counts.empty, counts.outside, counts.not_finite) == (1, 1, 1)
    assert counts.candidates == counts.detections + counts.suppressed + sum(counts.dropped.values())
    assert counts.detections == len(out)
    assert np.isfinite(out.bbox).all()
    assert (out.bbox[:, 2:] > 0).all()


def test_an_empty_file_stays_empty() -> None:
    assert list(rescore_saved(Stage(opinionated(SiblingHead(SMALL))), make_results())) == []
    assert saved_likeness(make_results(), SMALL) == {}
