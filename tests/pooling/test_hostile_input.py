"""Boxes and features that nobody should pool, and arguments that nobody should pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iou_refiner.pooling import taps
from iou_refiner.pooling.functional import prroi_pool
from iou_refiner.structures import FeatureMaps
from tests.pooling.maps import maps_of, random_map


@pytest.mark.parametrize("box", [(5.0, 5, 5, 9), (9.0, 2, 4, 7), (2.0, 9, 4, 3)])
def test_empty_and_inverted_boxes_pool_to_zero_with_gradient_zero(box: Any) -> None:
    boxes = torch.tensor([box, (1.0, 1, 4, 4)], requires_grad=True)
    pooled = prroi_pool(maps_of(random_map()), boxes)
    pooled.sum().backward()
    assert boxes.grad is not None
    assert not pooled[0].any()
    assert not boxes.grad[0].any()
    assert boxes.grad[1].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("edge", range(4))
def test_a_box_that_is_not_finite_pools_to_nan_and_disturbs_no_other(bad: float, edge: int) -> None:
    feature = random_map().requires_grad_()
    good = torch.tensor([[1.0, 1, 4, 4], [2.0, 3, 9, 8]], requires_grad=True)
    (expected,) = torch.autograd.grad(prroi_pool(maps_of(feature), good).sum(), feature)
    boxes = torch.tensor([[1.0, 1, 4, 4], [3.0, 3, 8, 8], [2.0, 3, 9, 8]])
    boxes[1, edge] = bad
    boxes.requires_grad_()
    pooled = prroi_pool(maps_of(feature), boxes)
    pooled[[0, 2]].sum().backward()
    assert boxes.grad is not None
    assert torch.isnan(pooled[1]).all()
    assert torch.isnan(boxes.grad[1]).all()
    assert torch.isfinite(boxes.grad[[0, 2]]).all()
    torch.testing.assert_close(feature.grad, expected)


def count_taps(boxes: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    counts, original = [], taps._outer

    def counted(*arguments: Any) -> Any:
        built = original(*arguments)
        counts.append(len(built.row))
        return built

    with monkeypatch.context() as patch:
        patch.setattr(taps, "_outer", counted)
        prroi_pool(maps_of(random_map(40, 60)), boxes)
    return sum(counts)


@pytest.mark.parametrize("size", [1e3, 1e9, 1e30])
def test_a_diverged_box_costs_no_more_than_one_as_large_as_the_map(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary = count_taps(torch.tensor([[0.0, 0, 60, 40]]), monkeypatch)
    assert 0 < ordinary < (40 + 3 * 7) * (60 + 3 * 7)
    for box in ([-size, -size, size, size], [0, 0, size, size], [-size, 3, size, 9], [size, 0, 2 * size, 9]):
        assert count_taps(torch.tensor([box], dtype=torch.float32), monkeypatch) <= ordinary


@pytest.mark.parametrize("chunk", [1, 500, 5000])
def test_cutting_the_work_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.rand(30, 4) * 12
    boxes[:, 2:] += boxes[:, :2] - 1  # some of them inverted

    def everything() -> list[Tensor]:
        feature, point = random_map(images=2).requires_grad_(), boxes.clone().requires_grad_()
        pooled = prroi_pool(maps_of(feature), point, image_index=torch.arange(30) % 2)
        return [pooled, *torch.autograd.grad(pooled.square().sum(), (feature, point))]

    whole = everything()
    monkeypatch.setattr(taps, "_CHUNK_TAPS", chunk)
    for one, other in zip(whole, everything(), strict=True):
        torch.testing.assert_close(one, other)


def test_nan_features_stay_under_the_boxes_that_touch_them() -> None:
    feature = random_map()
    feature[..., 3, 4] = torch.nan
    # Beside its cell, up to it, and over it.
    boxes = torch.tensor([[5.5, 4.5, 9, 9], [0.5, 0.5, 4.5, 3.5], [4.0, 3, 5, 5]])
    pooled = prroi_pool(maps_of(feature), boxes)
    assert torch.isfinite(pooled[0]).all()
    assert torch.isnan(pooled[1]).any()


def test_no_boxes_and_no_images_are_ordinary() -> None:
    feature = random_map().requires_grad_()
    boxes = torch.zeros(0, 4, requires_grad=True)
    pooled = prroi_pool(maps_of(feature), boxes)
    pooled.sum().backward()
    assert pooled.shape == (0, 3, 7, 7)
    assert feature.grad is not None
    assert not feature.grad.any()
    none = FeatureMaps((torch.zeros(0, 3, 4, 4),), (8.0,), ())
    assert prroi_pool(none, torch.zeros(0, 4)).shape == (0, 3, 7, 7)
    with pytest.raises(IndexError, match="`image_index`"):
        prroi_pool(none, torch.zeros(1, 4))


def test_maps_without_cells_pool_to_zero() -> None:
    pooled = prroi_pool(maps_of(torch.zeros(1, 2, 0, 5)), torch.tensor([[0.0, 0, 3, 3]]))
    assert not pooled.any()


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"image_index": torch.tensor([0, 2])}, IndexError, r"`image_index` must lie in \[0, 1\], got values from 0 to 2"),
    ({"image_index": torch.tensor([0, -1])}, IndexError, r"`image_index` must lie in \[0, 1\], got values from -1"),
    ({"image_index": torch.tensor([0])}, ValueError, r"`image_index` must have shape \(2,\) to match `boxes`"),
    ({"image_index": torch.tensor([0.0, 0.7])}, TypeError, "`image_index` must be integer, got torch.float32"),
    ({"image_index": torch.tensor([True, False])}, TypeError, "`image_index` must be integer"),
    ({"level": torch.tensor([0, 3])}, IndexError, r"`level` must lie in \[0, 1\]"),
    ({"level": None}, ValueError, "`level` must say from which of the 2 levels"),
    ({"boxes": torch.zeros(2, 5)}, ValueError, r"`boxes` must have shape \(N, 4\)"),
    ({"boxes": torch.zeros(2, 4).long()}, TypeError, "`boxes` must be floating point"),
    ({"boxes": torch.zeros(2, 4, device="meta")}, ValueError, "`boxes` is on meta but `features` is on cpu"),
    ({"output_size": 0}, ValueError, "`output_size` must be a finite number above 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    features = maps_of(random_map(images=2), random_map(images=2), strides=(1.0, 2.0))
    arguments = {"boxes": torch.rand(2, 4), "level": torch.zeros(2, dtype=torch.int64), **change}
    with pytest.raises(error, match=message):
        prroi_pool(features, **arguments)
