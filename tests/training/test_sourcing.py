"""Where a training reads from: what is quicker is chosen, what was asked for is done, and the head is the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner import DataError
from iou_refiner.coco import read_ground_truth
from iou_refiner.detector.live import LiveFeatures
from iou_refiner.training import sourcing
from iou_refiner.training.recipe import train
from iou_refiner.training.settings import TrainSettings
from iou_refiner.training.sourcing import Costs, Part, measured
from tests.kit.scenes import make_truth
from tests.kit.toys import make_dataset
from tests.training.test_recipe import CONFIG, SETTINGS

QUICK = replace(SETTINGS, views=2, epochs=2)
CPU = Costs(detect=4.0, write=0.12, read=0.03, nbytes=41_500_000)  # facts of R50-FPN at 800 pixels
GPU = Costs(detect=0.009, write=0.04, read=0.027, nbytes=41_500_000)
MEMORY = 1e12


def parts(images: int = 10, views: int = 1, passes: int = 2) -> list[Part]:
    return [Part(make_truth(range(images), [1]), Path(), views, passes)]


def pays(costs: Costs, these: list[Part], memory: float = MEMORY) -> bool:
    return costs.seconds(these, cached=True, memory=memory) < costs.seconds(these, cached=False, memory=memory)


def test_a_cache_pays_on_a_cpu_and_not_on_a_gpu():
    assert pays(CPU, parts())
    assert pays(CPU, parts(), memory=0)
    assert not pays(GPU, parts(passes=20))


seconds = st.floats(1e-4, 10)
costs = st.builds(Costs, seconds, seconds, seconds, st.integers(1, 10**8))


@given(costs, st.integers(1, 9), st.integers(1, 9))
def test_what_is_read_once_is_never_worth_keeping_and_more_passes_never_speak_against_it(costs, views, passes):
    assert not pays(costs, parts(views=views, passes=1))
    if pays(costs, parts(views=views, passes=passes)):
        assert pays(costs, parts(views=views, passes=passes + 1))
        assert pays(replace(costs, detect=costs.detect * 2), parts(views=views, passes=passes))


@given(costs, st.integers(1, 9))
def test_what_does_not_fit_into_memory_is_read_from_the_disk(costs, passes):
    few, many = (costs.seconds(parts(passes=passes), cached=True, memory=memory) for memory in (MEMORY, 0.0))
    assert many == pytest.approx(few + 10 * passes * costs.write)


def test_the_costs_are_those_of_the_first_images(tmp_path):
    path, detector = make_dataset(tmp_path / "images", 6)
    truth, shown = read_ground_truth(path), []
    live = LiveFeatures(detector, tmp_path / "images")
    found = measured(live, truth.images, tmp_path, shown.append)
    assert min(found.detect, found.write, found.read) > 0
    assert abs(found.nbytes - live.load(truth.images[0]).nbytes(sourcing.torch.float16)) < 3000
    assert [extraction.image_id for extraction in shown] == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["images"]
    assert measured(live, truth.images[:1], tmp_path, shown.append).nbytes > 0


# ---- The whole. ----


def trained(folder: Path, name: str, **options) -> tuple[bytes, list[str]]:
    path, detector = make_dataset(folder / "images", 8)
    truth, said = read_ground_truth(path), []
    train(
        detector, (truth, folder / "images"), output_dir=folder / name, config=CONFIG, settings=QUICK, note=said.append,
        **options,
    )  # fmt: skip
    return (folder / name / "head.safetensors").read_bytes(), said


def test_the_head_is_the_same_wherever_features_come_from(tmp_path, monkeypatch):
    head, said = trained(tmp_path, "a", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 16
    assert said == [f"Features of 16 views of images: about 0.00 GB in {tmp_path / 'cache'}"]
    live, said = trained(tmp_path, "b", cache="none")
    assert live == head
    assert said == []
    assert not (tmp_path / "b" / "cache").exists()
    for name, costs in (("c", CPU), ("d", GPU)):
        monkeypatch.setattr(sourcing, "measured", lambda *_, costs=costs: replace(costs, nbytes=1000))
        decided, said = trained(tmp_path, name)
        assert decided == head
        assert (tmp_path / name / "cache").exists() == (costs is CPU)
        assert said[0].startswith("A cache of features: an" if costs is CPU else "No cache of features, the detector")
    assert "an image takes 9 ms by the detector, 40 ms to write and 27 ms to read" in said[0]
    assert "0.00 GB (" in said[0]
    # What was begun is gone on with, whatever would be quicker now.
    (tmp_path / "d" / "cache").mkdir()
    shutil.copy(tmp_path / "c" / "cache" / "cache.json", tmp_path / "d" / "cache")
    again, said = trained(tmp_path, "d")
    assert again == head
    assert said == [f"Features of 16 views of images: about 0.00 GB in {tmp_path / 'd' / 'cache'}"]
    assert trained(tmp_path, "d")[1] == []


def test_a_cache_for_which_there_is_no_room_is_not_chosen_and_where_asked_for_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sourcing, "measured", lambda *_: CPU)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 15 * CPU.nbytes})())
    _, said = trained(tmp_path, "a")  # 16 views
    assert said[0].startswith("No cache of features")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 700_000})())
    with pytest.raises(DataError, match=r"needs about 0\.0 GB more"):  # 16 views of 52 kB, of which each half would fit
        trained(tmp_path, "b", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("images", "views"), [(1, 8), (1250, 8), (1300, 8), (2500, 4), (5000, 2), (10_000, 1), (118_287, 1), (10**7, 1)]
)
def test_few_images_are_seen_in_many_views(images, views):
    settings = TrainSettings(views="auto")
    assert settings.views_of(images) == settings.of(images).views == views
    assert TrainSettings(views=3).of(images).views == 3


def test_views_are_a_number_or_auto():
    with pytest.raises(ValueError, match=r"`views` must be a number or \"auto\", got 'many'"):
        TrainSettings(views="many")
