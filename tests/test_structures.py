"""The frozen records between detector and core: checked once, then relied on."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.structures import Detections, FeatureMaps, ImageTransform


def features(**changes: Any) -> FeatureMaps:
    arguments = {
        "levels": [torch.zeros(2, 3, 8, 10), torch.zeros(2, 5, 4, 5)],
        "strides": [8, 16],
        "image_sizes": [(64, 80), [60, 70]],
    }
    return FeatureMaps(**{**arguments, **changes})


def detections(count: int = 3, **changes: Any) -> Detections:
    arguments = {
        "boxes": torch.rand(count, 4),
        "scores": torch.rand(count),
        "labels": torch.arange(count),
        "ious": torch.rand(count),
    }
    return Detections(**{**arguments, **changes})


# ---- FeatureMaps. ----


def test_feature_maps_say_what_they_are() -> None:
    maps = features()
    assert len(maps) == 2
    assert maps.channels == (3, 5)
    assert maps.strides == (8.0, 16.0)
    assert maps.image_sizes == ((64, 80), (60, 70))
    assert maps.device == torch.device("cpu")
    assert isinstance(maps.levels, tuple)
    with pytest.raises(FrozenInstanceError):
        maps.strides = (1.0,)  # type: ignore[misc]


def test_feature_maps_of_no_images_are_ordinary() -> None:
    maps = features(levels=[torch.zeros(0, 3, 4, 4)], strides=[8], image_sizes=[])
    assert len(maps) == 0


FEATURE_FAULTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"strides": [8]}, ValueError, "one stride per level: got 2 levels, 1 strides"),
    ({"levels": [], "strides": []}, ValueError, "got 0 levels, 0 strides"),
    ({"levels": [torch.zeros(3, 8, 10), torch.zeros(2, 5, 4, 5)]}, ValueError, r"`levels\[0\]` must have shape"),
    (
        {"levels": [torch.zeros(2, 3, 8, 10), torch.zeros(2, 5, 4, 5).int()]},
        TypeError,
        r"`levels\[1\]` must be floating",
    ),
    ({"image_sizes": [(64, 80)]}, ValueError, r"`levels\[0\]` holds 2 images but `image_sizes` has 1 entries"),
    ({"strides": [8, 0]}, ValueError, r"`strides\[1\]` must be a finite number above 0, got 0.0"),
    ({"strides": [float("nan"), 8]}, ValueError, r"`strides\[0\]` must be a finite number above 0"),
    (
        {"levels": [torch.zeros(2, 3, 8, 10), torch.zeros(2, 5, 4, 5, device="meta")]},
        ValueError,
        r"`levels\[1\]` is on meta but `levels\[0\]` is on cpu",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), FEATURE_FAULTS)
def test_faults_of_feature_maps_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        features(**change)


# ---- Detections. ----


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, None), slice(0, 0)])
def test_rows_are_taken_from_every_column(rows: Any) -> None:
    whole = detections(source=torch.tensor([7, 8, 9]))
    part = whole[rows]
    for name in ("boxes", "scores", "labels", "ious", "source"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    assert len(part) == len(part.boxes)


def test_absent_columns_stay_absent() -> None:
    one = detections(ious=None)[torch.tensor([0])].to("cpu")
    assert one.ious is None
    assert one.source is None


def test_replacing_leaves_the_original() -> None:
    before = detections()
    changed = before.replace(scores=torch.zeros(3), ious=None)
    assert not changed.scores.any()
    assert changed.ious is None
    assert before.scores.any()
    assert changed.boxes is before.boxes
    with pytest.raises(ValueError, match=r"`scores` must have shape \(3,\) to match `boxes`, got \(2,\)"):
        before.replace(scores=torch.zeros(2))


def test_moving_to_a_device_moves_every_column() -> None:
    moved = detections(source=torch.arange(3)).to("meta")
    assert {getattr(moved, name).device.type for name in ("boxes", "scores", "labels", "ious", "source")} == {"meta"}


def test_as_a_dict_detections_are_those_of_torchvision() -> None:
    with_ious, without = detections(source=torch.arange(3)), detections(ious=None)
    assert list(with_ious.to_dict()) == ["boxes", "scores", "labels", "ious"]
    assert list(without.to_dict()) == ["boxes", "scores", "labels"]
    for whole in (with_ious, without):
        assert all(values is getattr(whole, name) for name, values in whole.to_dict().items())


def test_no_detections_are_ordinary() -> None:
    assert len(detections(0)) == 0


DETECTION_FAULTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"boxes": torch.zeros(3, 5)},
        ValueError,
        r"`boxes` must have shape \(N, 4\), rows \(x1, y1, x2, y2\), got \(3, 5\)",
    ),
    ({"boxes": torch.zeros(3, 4).int()}, TypeError, "`boxes` must be floating point, got torch.int32. Convert with"),
    ({"scores": torch.zeros(3, 1)}, ValueError, r"`scores` must have shape \(3,\)"),
    ({"labels": torch.zeros(2).long()}, ValueError, r"`labels` must have shape \(3,\)"),
    ({"labels": torch.zeros(3).int()}, TypeError, "`labels` must be int64, got torch.int32"),
    ({"ious": torch.zeros(4)}, ValueError, r"`ious` must have shape \(3,\)"),
    ({"source": torch.zeros(1)}, ValueError, r"`source` must have shape \(3,\)"),
    ({"scores": torch.zeros(3, device="meta")}, ValueError, "`scores` is on meta but `boxes` is on cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), DETECTION_FAULTS)
def test_faults_of_detections_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        detections(**change)


# ---- ImageTransform. ----

_scale = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20))
_offset = st.tuples(st.floats(-500, 500), st.floats(-500, 500))
_transforms = st.builds(ImageTransform, st.just((480, 640)), _scale, _offset)
_boxes = st.lists(st.tuples(*[st.floats(-2000, 2000)] * 4), max_size=4).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
)


@settings(max_examples=40)
@given(transform=_transforms, boxes=_boxes)
def test_there_and_back(transform: ImageTransform, boxes: torch.Tensor) -> None:
    torch.testing.assert_close(transform.to_image(transform.to_network(boxes)), boxes, rtol=0, atol=1e-8)


@settings(max_examples=40)
@given(first=_transforms, second=_transforms, third=_transforms, boxes=_boxes)
def test_transforms_compose(
    first: ImageTransform, second: ImageTransform, third: ImageTransform, boxes: torch.Tensor
) -> None:
    both = first.then(second)
    torch.testing.assert_close(both.to_network(boxes), second.to_network(first.to_network(boxes)), rtol=1e-9, atol=1e-6)
    left, right = both.then(third), first.then(second.then(third))
    torch.testing.assert_close(left.to_network(boxes), right.to_network(boxes), rtol=1e-9, atol=1e-6)
    assert both.image_size == first.image_size


def test_the_whole_image_becomes_the_whole_network_input() -> None:
    transform = ImageTransform.resize((480, 640), (240, 160))
    network = transform.to_network(torch.tensor([[0.0, 0, 640, 480]]))
    assert network.tolist() == [[0, 0, 160, 240]]
    letterbox = transform.then(ImageTransform((240, 160), offset=(40.0, 0.0)))
    assert letterbox.to_network(torch.tensor([[0.0, 0, 640, 480]])).tolist() == [[40, 0, 200, 240]]


def test_the_default_transform_changes_nothing() -> None:
    boxes = torch.rand(3, 4)
    assert torch.equal(ImageTransform((4, 4)).to_network(boxes), boxes)
    assert ImageTransform((4, 4)).to_image(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.0, -2.0), (1.0, float("inf"))])
def test_a_scale_that_cannot_be_undone_is_refused(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"`scale \([xy]\)` must be a finite number above 0"):
        ImageTransform((4, 4), scale)


def test_detections_come_back_into_the_image() -> None:
    transform = ImageTransform((100, 80), (2.0, 2.0), (10.0, 0.0))
    network = detections(2, boxes=torch.tensor([[30.0, 20, 50, 60], [0, 0, 900, 900]]))
    image = transform.detections_to_image(network)
    assert image.boxes.tolist() == [[10, 10, 20, 30], [0, 0, 80, 100]]
    assert torch.equal(image.scores, network.scores)
