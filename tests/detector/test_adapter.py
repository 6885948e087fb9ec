"""The adapter contract: what a subclass must say, and what it gets for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iou_refiner import Adapter, Detections, FeatureMaps, fingerprint
from iou_refiner.detector.adapter import COCO_CATEGORY_IDS
from tests.kit.toys import SIZE, ToyDetector, ToyScene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ToyScene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("name", ["prepare", "twin", "transforms", "settings"])
def test_what_only_the_subclass_can_know_must_be_given(name: str) -> None:
    parts = {part: getattr(ToyDetector, part) for part in ("prepare", "twin", "transforms", "settings") if part != name}
    with pytest.raises(TypeError, match=rf"abstract method '?{name}"):
        type("Incomplete", (Adapter,), parts)()


class Wrapped(Adapter):
    """An adapter that is not the detector itself, with nothing but what it must have."""

    def __init__(self, detector: ToyDetector):
        self.detector = detector

    def prepare(self, rgb: Any) -> Any:
        return self.detector.prepare(rgb)

    def twin(self, suppression: Any) -> Any:
        return self.detector.twin(suppression)

    def transforms(self, images: Any, features: FeatureMaps) -> Any:
        return self.detector.transforms(images, features)

    def settings(self) -> str:
        return "none"


def test_defaults_are_those_of_a_torch_module(scene: ToyScene) -> None:
    adapter, detector = Wrapped(scene.detector), scene.detector
    assert adapter.name == "ToyDetector"
    assert adapter.category_ids is None
    assert adapter.device == torch.device("cpu")
    assert not adapter.training
    assert adapter.fingerprint() == fingerprint(detector)
    assert adapter.to("cpu") is adapter
    for ours, own in zip(adapter.detect(scene.images), detector(scene.images), strict=True):
        assert ours.keys() == own.keys()
        assert all(torch.equal(ours[name], own[name]) for name in own)


def test_running_puts_another_suppression_in_the_place_of_the_detectors_own(scene: ToyScene) -> None:
    seen: list[Any] = []

    def first_two(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        seen.append((features, candidates, torch.is_grad_enabled()))
        return [c[:2].replace(ious=torch.full((2,), 0.5)) for c in candidates]

    before = fingerprint(scene.detector)
    results = Wrapped(scene.detector).run(first_two, scene.images)
    ((features, candidates, with_grad),) = seen
    assert not with_grad
    assert features.image_sizes == ((SIZE, SIZE),) * 3
    for result, image in zip(results, candidates, strict=True):
        assert torch.equal(result["boxes"], image.boxes[:2])
        assert result["ious"].tolist() == [0.5, 0.5]
    assert fingerprint(scene.detector) == before
    assert "ious" not in scene.detector(scene.images)[0]


def test_extracting_gives_what_the_suppression_would_be_given(scene: ToyScene) -> None:
    features, candidates, transforms = Wrapped(scene.detector).extract(scene.images)
    assert len(features) == len(candidates) == len(transforms) == 3
    own = ToyDetector.own_suppression(features, candidates)
    for mine, result in zip(own, scene.detector(scene.images), strict=True):
        assert torch.equal(mine.boxes, result["boxes"])
        assert len(mine) < len(candidates[0])


def test_the_categories_of_coco() -> None:
    assert len(COCO_CATEGORY_IDS) == 80
    assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[-1]) == (1, 90)
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(COCO_CATEGORY_IDS)
