"""The training loop: it learns, the same seed gives the same bytes, and what goes wrong is said."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from iou_refiner import DataError, HeadConfig, IoUHead, TrainSettings, fingerprint, load_head, train_head
from iou_refiner.coco import Image
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.training import loop
from iou_refiner.training.loop import measure
from iou_refiner.training.losses import total_loss
from iou_refiner.training.samples import TrainingSet, collate, sample_boxes
from iou_refiner.training.step import train_step
from tests.kit.toys import ToyData, make_cached

SETTINGS = TrainSettings(epochs=2, batch_size=4, boxes_per_image=24, lr=3e-3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyData:
    return make_cached(tmp_path_factory.mktemp("toy"))


def head(seed: int = 0, **config) -> IoUHead:
    torch.manual_seed(seed)
    return IoUHead((4, 4), (1, 2), HeadConfig(**{"width": 4, "hidden": (32,), "output_size": 5, **config}))


@pytest.mark.parametrize("objective", ["bce", "smooth_l1"])
@pytest.mark.parametrize("levels", [1, 3])
def test_it_learns(toy, objective, levels):
    _, truth, _, cache = toy
    data, trained = TrainingSet(cache, truth), head(objective=objective, levels=levels)
    before = measure(trained, data)["mae"]
    history = train_head(trained, data, replace(SETTINGS, epochs=10), val=data)
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]
    assert history[-1]["mae"] < 0.6 * before
    assert history[-1]["pearson"] > 0.5


def test_boxes_and_loss_may_be_ones_own(toy):
    _, truth, _, cache = toy
    data, seen = TrainingSet(cache, truth), []

    def sample(extraction, targets, count, **settings):
        return sample_boxes(extraction, targets, count, **settings)[torch.tensor([0, 1])]

    def loss(head, embedding, samples, image_index):
        seen.append((len(samples), image_index.unique().numel()))
        return total_loss(head, embedding, samples, image_index) * 0

    trained = head()
    before = {name: value.clone() for name, value in trained.state_dict().items() if "output" in name}
    assert len(before) == 6
    train_head(trained, data, replace(SETTINGS, weight_decay=0.0), sample=sample, loss=loss)
    assert set(seen) == {(8, 4)}
    assert all(torch.equal(trained.state_dict()[name], value) for name, value in before.items())


def test_same_seed_same_bytes(toy, tmp_path):
    _, truth, _, cache = toy
    data = TrainingSet(cache, truth, views=2)
    for name in "ab":
        train_head(head(), data, SETTINGS, output_dir=tmp_path / name)
    first, second = ((tmp_path / name / "head.safetensors").read_bytes() for name in "ab")
    assert first == second
    train_head(head(), data, SETTINGS, output_dir=tmp_path / "c", seed=1)
    assert (tmp_path / "c" / "head.safetensors").read_bytes() != first


def test_stopped_and_resumed_ends_with_the_same_head(toy, tmp_path):
    _, truth, _, cache = toy
    data, settings = TrainingSet(cache, truth), replace(SETTINGS, epochs=3)
    train_head(head(), data, settings, output_dir=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(phase: str, done: int, total: int) -> None:
        if done == total - 1:
            raise Killed

    with pytest.raises(Killed):
        train_head(head(), data, settings, output_dir=tmp_path / "cut", progress=kill)
    history = train_head(head(seed=9), data, settings, output_dir=tmp_path / "cut", resume=True)
    whole, cut = ((tmp_path / name / "head.safetensors") for name in ("whole", "cut"))
    weights = [load_head(path).state_dict() for path in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [m["epoch"] for m in history] == [1, 2, 3]
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_a_checkpoint_within_an_epoch_is_gone_on_with(toy, tmp_path):
    _, truth, _, cache = toy
    data, settings = TrainingSet(cache, truth), replace(SETTINGS, epochs=2, batch_size=3)
    whole = train_head(head(), data, settings, output_dir=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(phase: str, done: int, total: int) -> None:
        if done == 7:  # of 8; before it is kept
            raise Killed

    with pytest.raises(Killed):
        train_head(head(), data, settings, output_dir=tmp_path / "cut", progress=kill, checkpoint_minutes=1e-9)
    seen = []
    history = train_head(
        head(seed=9), data, settings, output_dir=tmp_path / "cut", resume=True, progress=lambda *said: seen.append(said)
    )
    assert seen == [("training", 7, 8), ("training", 8, 8)]
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in whole]
    first, second = ((tmp_path / name / "head.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


def test_checkpoints_are_as_far_apart_as_is_said(toy, tmp_path):
    _, truth, _, cache = toy
    saves = []
    for minutes in (1e-9, 60):
        states = set()

        def look(*_, states=states) -> None:
            if (tmp_path / "last.pt").exists():
                states.add((tmp_path / "last.pt").stat().st_ino)

        settings = replace(SETTINGS, epochs=1)
        train_head(
            head(), TrainingSet(cache, truth), settings, output_dir=tmp_path, progress=look, checkpoint_minutes=minutes
        )
        saves.append(len(states))
        (tmp_path / "last.pt").unlink()
    assert saves == [2, 0]  # three steps; what was kept after the last is not seen


@pytest.mark.parametrize("begun", [5, "much", {"steps": "1"}, {"steps": -1}, {"what": 1}, {"boxes": 1.5}])
def test_a_damaged_note_of_how_far_an_epoch_came_is_refused(toy, tmp_path, begun):
    _, truth, _, cache = toy
    data = TrainingSet(cache, truth)
    train_head(head(), data, SETTINGS, output_dir=tmp_path)
    state = torch.load(tmp_path / "last.pt")
    torch.save(state | {"begun": begun}, tmp_path / "last.pt")
    with pytest.raises(DataError, match=r"last\.pt is damaged or no state of a training"):
        train_head(head(), data, SETTINGS, output_dir=tmp_path, resume=True)


def test_the_gradient_is_that_of_the_loss_of_the_whole_batch(toy):
    """Image by image or all at once: the same up to the order of sums."""
    _, truth, _, cache = toy
    data, ours = TrainingSet(cache, truth), head()
    loaded = [data.load(row) for row in range(5)]
    samples = [
        sample_boxes(*each, 20, candidate_share=0.5, jitter_min_iou=0.2, generator=torch.Generator().manual_seed(row))
        for row, each in enumerate(loaded)
    ]
    samples[2] = samples[2][:0]  # an image without boxes
    batch, image_index = collate(samples)
    table = FeatureTable.concat([ours.encode(extraction.features) for extraction, _ in loaded])
    value = total_loss(ours, ours.roi_embedding(table, batch.boxes, image_index), batch, image_index)
    value.backward()
    expected = {name: weight.grad.clone() for name, weight in ours.named_parameters()}
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    extractions = [extraction for extraction, _ in loaded]
    assert train_step(ours, extractions, samples, [1, 2, 3, 4, 5], total_loss, optimizer) == (
        pytest.approx(value.item(), rel=1e-5), len(batch),
    )  # fmt: skip
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(
            weight.grad, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item()
        )


def test_weights_that_have_no_part_in_the_loss_are_left_alone(toy):
    _, truth, _, cache = toy
    trained = head()

    def loss(head, embedding, samples, image_index):
        return head.iou_logits(embedding).square().mean()

    before = {name: weight.clone() for name, weight in trained.named_parameters()}
    train_head(trained, TrainingSet(cache, truth), replace(SETTINGS, epochs=1, weight_decay=0.5), loss=loss)
    changed = {name for name, weight in trained.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if not name.startswith(("ranking_output", "deltas_output"))}


def test_the_boxes_of_an_image_do_not_depend_on_the_batch_it_is_in(toy):
    _, truth, _, cache = toy
    drawn: list[dict[int, torch.Tensor]] = []
    for batch_size in (3, 5):
        seen: dict[int, torch.Tensor] = {}

        def sample(extraction, targets, seen=seen, **settings):
            seen[extraction.image_id] = sample_boxes(extraction, targets, **settings)
            return seen[extraction.image_id]

        settings = replace(SETTINGS, epochs=1, batch_size=batch_size)
        train_head(head(), TrainingSet(cache, truth), settings, sample=sample)
        drawn.append({image: samples.boxes for image, samples in seen.items()})
    assert drawn[0].keys() == drawn[1].keys()
    assert all(torch.equal(boxes, drawn[1][image]) for image, boxes in drawn[0].items())


def test_measuring_is_bounded_and_spread_over_all_images(toy, monkeypatch):
    _, truth, _, cache = toy
    monkeypatch.setattr(loop, "_MEASURED_IMAGES", 5)
    data = TrainingSet(cache, truth)
    assert [image.id for image, _ in loop._some(data).items] == [1, 3, 6, 9, 12]
    assert len(data) == 12
    monkeypatch.setattr(loop, "_MEASURED_IMAGES", 12)
    assert loop._some(data) is data


def test_resuming_with_other_settings_is_refused(toy, tmp_path):
    _, truth, _, cache = toy
    data = TrainingSet(cache, truth)
    train_head(head(), data, SETTINGS, output_dir=tmp_path)
    with pytest.raises(DataError, match="made with another epochs, lr"):
        train_head(head(), data, replace(SETTINGS, lr=1e-4, epochs=5), output_dir=tmp_path, resume=True)


def test_the_detector_is_proven_frozen(toy):
    folder, truth, detector, _ = toy
    loose = type(detector)(detector.gt_boxes)
    cache = FeatureCache(folder / "loose", loose).of(folder)
    list(cache.fill(truth.images))

    def touch(phase: str, done: int, total: int) -> None:
        with torch.no_grad():
            loose.weight.add_(1.0)

    with pytest.raises(RuntimeError, match="weights changed"):
        train_head(head(), TrainingSet(cache, truth), replace(SETTINGS, epochs=1), progress=touch)


def test_features_that_are_not_finite_stop_the_training_with_the_image(toy, tmp_path):
    folder, truth, detector, _ = toy
    cache = FeatureCache(tmp_path, detector).of(folder)
    list(cache.fill(truth.images))
    load = cache.load

    def poisoned(image: Image, *, view: int = 0):
        extraction = load(image, view=view)
        if image.id == 7:
            extraction.features.levels[0].fill_(torch.nan)
        return extraction

    cache.load = poisoned
    with pytest.raises(DataError, match=r"loss is nan on images .*\b7\b"):
        train_head(head(), TrainingSet(cache, truth), SETTINGS)


def test_a_run_that_is_through_resumes_to_the_same_head(toy, tmp_path):
    _, truth, _, cache = toy
    data = TrainingSet(cache, truth)
    history = train_head(head(), data, SETTINGS, val=data, output_dir=tmp_path)
    resumed, seen = head(seed=9), []
    again = train_head(
        resumed, data, SETTINGS, val=data, output_dir=tmp_path, resume=True, progress=lambda *said: seen.append(said)
    )  # fmt: skip
    loaded = load_head(tmp_path / "head.safetensors")
    assert again == history
    assert seen == []
    assert fingerprint(resumed) == fingerprint(loaded)
    assert resumed.metadata == loaded.metadata


def test_the_head_says_how_it_was_trained(toy, tmp_path):
    _, truth, _, cache = toy
    data, trained = TrainingSet(cache, truth), head()
    history = train_head(trained, data, SETTINGS, val=data, seed=3)
    assert trained.metadata.training == {**asdict(SETTINGS), "seed": 3, "images": 12}
    assert trained.metadata.metrics == {name: value for name, value in history[-1].items() if name != "seconds"}
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_step_in_one_phase(toy):
    _, truth, _, cache = toy
    seen = []
    train_head(head(), TrainingSet(cache, truth, views=2), SETTINGS, progress=lambda *said: seen.append(said))
    assert seen == [("training", step + 1, 12) for step in range(12)]  # 24 views in batches of 4, twice


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "`epochs`"),
        ({"candidate_share": 2}, "`candidate_share`"),
        ({"lr": float("nan")}, "`lr`"),
        ({"views": 0}, "`views`"),
        ({"jitter_min_iou": 0.01}, r"`jitter_min_iou` must lie in \[0.02, 1\], got 0.01"),
        ({"weight_decay": -1}, "`weight_decay` must be 0 or more, got -1"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **wrong)
