"""Where features come from: the live detector, or the cache, which says the same within half precision."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from iou_refiner import DataError
from iou_refiner.detector.features import extract_image
from iou_refiner.detector.sources import FeatureCache, feature_source
from tests.kit.toys import ToyData, make_cached


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> ToyData:
    return make_cached(tmp_path_factory.mktemp("toy"))


def test_the_cache_gives_back_what_the_detector_extracted(toy):
    folder, truth, detector, cache = toy
    live, cached = extract_image(detector, folder, truth.images[0]), cache.load(truth.images[0])
    for a, b in zip(live.features.levels, cached.features.levels, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=6e-4)  # float16
    assert torch.equal(live.candidates.boxes, cached.candidates.boxes)
    assert live.transform == cached.transform
    assert live.features.image_sizes == cached.features.image_sizes


def test_what_is_there_is_not_extracted_again(toy):
    _, truth, _, cache = toy
    assert list(cache.fill(truth.images)) == []


def test_the_cache_of_another_detector_is_refused(toy, tmp_path):
    _, _, detector, cache = toy
    other = type(detector)(detector.gt_boxes)
    with torch.no_grad():
        other.weight.fill_(2.0)
    with pytest.raises(DataError, match="made with another detector"):
        FeatureCache(cache.cache.folder, other)
    with pytest.raises(DataError, match="made with another dtype"):
        FeatureCache(cache.cache.folder, detector, dtype="float32")


def test_a_full_disk_is_said_before_it_fills(toy, tmp_path, monkeypatch):
    folder, truth, detector, _ = toy
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"needs about .* GB more"):
        list(FeatureCache(tmp_path, detector).of(folder).fill(truth.images))


def test_a_damaged_entry_is_named(toy, tmp_path):
    folder, truth, detector, _ = toy
    cache = FeatureCache(tmp_path, detector).of(folder)
    list(cache.fill(truth.images[:1]))
    (entry,) = tmp_path.glob("1-0-*.safetensors")
    entry.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=f"Image 1 cannot be read .*{entry} is damaged .*Remove that file"):
        cache.load(truth.images[0])


def test_images_that_are_not_what_the_annotation_says(toy, tmp_path):
    folder, truth, detector, _ = toy
    image = truth.images[0]
    with pytest.raises(DataError, match="does not exist"):
        extract_image(detector, tmp_path, image)
    (tmp_path / image.file_name).write_bytes(b"no image")
    with pytest.raises(DataError, match="no image of a format read here"):
        extract_image(detector, tmp_path, image)
    wrong = type(image)(image.id, image.file_name, 99, image.height)
    with pytest.raises(DataError, match="64 x 64 pixels, its annotation says 99 x 64"):
        extract_image(detector, folder, wrong)


@pytest.mark.parametrize("cached", [False, True])
def test_a_source_extracts_as_the_detector_does_and_a_cached_one_only_once(toy, tmp_path, monkeypatch, cached):
    folder, truth, detector, _ = toy
    source = feature_source(detector, folder, tmp_path if cached else None)
    live = extract_image(detector, folder, truth.images[3])
    for _ in range(2):
        extraction = source(truth.images[3])
        assert extraction.image_id == live.image_id
        assert extraction.transform == live.transform
        assert torch.equal(extraction.candidates.boxes, live.candidates.boxes)
        for a, b in zip(extraction.features.levels, live.features.levels, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=6e-4 if cached else 0)
    assert len(list(tmp_path.glob("*.safetensors"))) == cached
    monkeypatch.setattr(type(detector), "forward", None)
    if cached:
        assert source(truth.images[3]).image_id == live.image_id
    else:
        with pytest.raises(TypeError):
            source(truth.images[3])


def test_the_size_on_disk_is_foretold(toy):
    _, truth, _, cache = toy
    extraction = cache.load(truth.images[0])
    told = extraction.nbytes(torch.float16)
    (entry,) = cache.cache.folder.glob(f"{truth.images[0].id}-0-*.safetensors")
    assert abs(entry.stat().st_size - told) < 1536  # the header
    assert extraction.nbytes(torch.float32) - told == 2 * sum(np.prod(x.shape) for x in extraction.features.levels)
