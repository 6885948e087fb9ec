"""Where features come from: the live detector, or the cache, which says the same within half precision."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from iou_refiner import DataError
from iou_refiner.coco import GroundTruth, Image
from iou_refiner.detector.features import Extraction, extract_image
from iou_refiner.detector.loading import Loading
from iou_refiner.detector.sources import FeatureCache, LiveFeatures, MemoryFeatures, feature_source
from tests.kit.toys import ToyData, ToyDetector, make_cached


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


# ---- Many views of images, with work done ahead. ----


def equal(a: Extraction, b: Extraction) -> bool:
    """To the bit, where they come from aside."""
    levels = zip(a.features.levels, b.features.levels, strict=True)
    return (
        all(x.dtype == y.dtype and torch.equal(x, y) for x, y in levels)
        and all(torch.equal(getattr(a.candidates, n), getattr(b.candidates, n)) for n in ("boxes", "scores", "labels"))
        and (a.image_id, a.transform, a.content) == (b.image_id, b.transform, b.content)
    )


def views_of(truth: GroundTruth) -> list[tuple[Image, int]]:
    return [(image, view) for view in range(3) for image in reversed(truth.images)]


@pytest.mark.parametrize("workers", [0, 3])
def test_live_and_cached_features_are_the_same_to_the_bit_one_by_one_and_as_a_stream(toy, workers):
    folder, truth, detector, cache = toy
    items, loading = views_of(truth), Loading(workers=workers)
    live = LiveFeatures(detector, folder, loading=loading, dtype=torch.float16)
    cached = FeatureCache(cache.cache.folder, detector, loading=loading).of(folder)
    expected = [cache.load(image, view=view) for image, view in items]
    assert {level.dtype for extraction in expected for level in extraction.features.levels} == {torch.float32}
    for source in (live, cached, MemoryFeatures(live), MemoryFeatures(cached)):
        assert source.missing(truth.images, view=2) == []
        assert source.notes() == []
        for got in (source.stream(items), (source.load(image, view=view) for image, view in items)):
            assert all(equal(a, b) for a, b in zip(got, expected, strict=True))
    plain = LiveFeatures(detector, folder).load(truth.images[0])
    assert not torch.equal(plain.features.levels[0], live.load(truth.images[0]).features.levels[0])


class OnAccelerator(ToyDetector):
    """Says that it is on a GPU, and notes the batches it is given."""

    def __init__(self, gt_boxes):
        super().__init__(gt_boxes)
        self.batches: list[int] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def forward(self, images):
        self.batches.append(len(images))
        return super().forward(images)


@pytest.mark.parametrize("workers", [0, 2])
def test_on_an_accelerator_images_of_one_shape_share_a_batch_and_come_in_order(toy, workers):
    folder, truth, detector, _ = toy
    accelerated = OnAccelerator(detector.gt_boxes)
    items = [(image, view) for image in truth.images for view in range(3)]
    source = LiveFeatures(accelerated, folder, loading=Loading(workers=workers, batch_images=5))
    expected = [LiveFeatures(detector, folder).load(image, view=view) for image, view in items]
    assert all(equal(a, b) for a, b in zip(source.stream(items), expected, strict=True))
    # Of the first 20, which are looked at together, 14 are of full size, and 6 have shapes of their own.
    assert accelerated.batches[:9] == [5, 5, 4, 1, 1, 1, 1, 1, 1]
    assert sum(accelerated.batches) == len(items)
    assert max(accelerated.batches) == 5


def test_on_a_cpu_images_go_one_by_one(toy):
    folder, truth, detector, _ = toy
    alone = OnAccelerator(detector.gt_boxes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnAccelerator, "device", torch.device("cpu"))
        list(LiveFeatures(alone, folder).stream(views_of(truth)))
    assert alone.batches == [1] * 36


def test_memory_asks_once_for_what_it_has_room_for(toy):
    folder, truth, detector, cache = toy
    size, asked = cache.load(truth.images[0]).nbytes(torch.float16), []

    class Counting(LiveFeatures):
        def load(self, image, *, view=0):
            asked.append(image.id)
            return super().load(image, view=view)

    room = size * 5 // 2  # for the first two, of 12 images of about this size
    source = MemoryFeatures(Counting(detector, folder, dtype=torch.float16), room)
    for _ in range(3):
        for image in truth.images[:4]:
            assert equal(source(image), cache.load(image))
    assert asked == [1, 2, 3, 4, 3, 4, 3, 4]
    assert [e.image_id for e in source.stream([(image, 0) for image in truth.images])] == list(range(1, 13))


def test_room_for_all_that_is_to_come_is_needed_before_the_first_is_stored(toy, tmp_path, monkeypatch):
    folder, truth, detector, _ = toy
    cache = FeatureCache(tmp_path, detector).of(folder)
    size = LiveFeatures(detector, folder).load(truth.images[0]).nbytes(torch.float16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10 * size})())
    items = [(image, 0) for image in truth.images[:5]]
    with pytest.raises(DataError, match=r"needs about .* GB more"):
        list(cache.fill_views(items, entries=20))
    assert list(tmp_path.glob("*.safetensors")) == []
    assert len(list(cache.fill_views(items))) == 5


def test_the_size_on_disk_is_foretold(toy):
    _, truth, _, cache = toy
    extraction = cache.load(truth.images[0])
    told = extraction.nbytes(torch.float16)
    (entry,) = cache.cache.folder.glob(f"{truth.images[0].id}-0-*.safetensors")
    assert abs(entry.stat().st_size - told) < 1536  # the header
    assert extraction.nbytes(torch.float32) - told == 2 * sum(np.prod(x.shape) for x in extraction.features.levels)
