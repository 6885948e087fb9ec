"""Precise RoI Pooling against slow oracles, and by its laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.pooling import operator, portable, taps
from iou_refiner.pooling.functional import assign_levels, prroi_pool
from iou_refiner.pooling.table import FeaturePyramid
from iou_refiner.structures import FeatureMaps
from tests.kit.reference import prroi_pool_gradient_reference, prroi_pool_reference, sampled_mean

# The contract: largest error relative to the range of the map, and of the gradient to the box.
FORWARD, GRADIENT = 2e-6, 1e-5


def maps_of(*levels: Tensor, strides: tuple[float, ...] = (1.0,)) -> FeatureMaps:
    return FeatureMaps(levels, strides, ((100, 100),) * len(levels[0]))


def random_map(height: int = 14, width: int = 17, channels: int = 3, images: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(images, channels, height, width, generator=torch.Generator().manual_seed(seed))


def in_cells(boxes: Tensor, stride: float, *, aligned: bool = True) -> np.ndarray:
    return boxes.detach().double().numpy() / stride - (0.5 if aligned else 0.0)


def oracle(feature: Tensor, boxes: Tensor, stride: float, bins: int, *, aligned: bool = True) -> Tensor:
    cells = in_cells(boxes, stride, aligned=aligned)
    pooled = [prroi_pool_reference(feature.double().numpy(), box, bins) for box in cells]
    return torch.tensor(np.array(pooled)).reshape(len(boxes), len(feature), bins, bins)


def span(feature: Tensor) -> float:
    return float(feature.max() - feature.min())


# Edges in cells, some of them on the grid; sizes over five orders of magnitude.
_place = st.one_of(st.floats(-6, 22), st.integers(-3, 20).map(float), st.integers(-6, 40).map(lambda v: v / 2))
_size = st.one_of(st.floats(-4, 1.6).map(lambda e: 10.0**e), st.integers(1, 12).map(float))
_cell_box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), _place, _place, _size, _size)
_broken = st.sampled_from(
    [
        (5.0, 5.0, 5.0, 9.0),
        (9.0, 2.0, 4.0, 7.0),
        (2.0, 9.0, 4.0, 3.0),
        (float("nan"), 1.0, 4.0, 5.0),
        (1.0, 1.0, float("inf"), 5.0),
        (float("-inf"), 1.0, 3.0, 5.0),
        (-1e30, -1e30, 1e30, 1e30),
        (2.0, 1e30, 3.0, 2e30),
        (0.0, 0.0, 0.0, 0.0),
    ]
)


# ---- The value. ----


def test_the_oracle_itself_agrees_with_plain_sampling() -> None:
    feature = random_map(6, 5, 2)[0].double().numpy()
    for box in [(0.3, 0.4, 2.9, 3.1), (-2.0, 1.0, 3.0, 7.5), (1.0, 1.0, 2.0, 2.0)]:
        whole = prroi_pool_reference(feature, np.array(box), 1)[:, 0, 0]
        np.testing.assert_allclose(whole, sampled_mean(feature, box, 80), atol=2e-4)


@settings(max_examples=60)
@given(
    cells=st.lists(st.one_of(_cell_box, _broken), max_size=6),
    stride=st.sampled_from([1.0, 4.0, 7.0, 32.0]),
    bins=st.sampled_from([1, 2, 3, 7]),
    aligned=st.booleans(),
)
def test_value_is_the_exact_mean(cells: list[Any], stride: float, bins: int, aligned: bool) -> None:
    feature = random_map()
    boxes = ((torch.tensor(cells, dtype=torch.float64).reshape(-1, 4) + 0.5 * aligned) * stride).float()
    pooled = prroi_pool(maps_of(feature, strides=(stride,)), boxes, output_size=bins, aligned=aligned)
    expected = oracle(feature[0], boxes, stride, bins, aligned=aligned)
    assert pooled.dtype == torch.float32
    assert pooled.shape == expected.shape
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=FORWARD * span(feature), equal_nan=True)


def test_boxes_find_their_image_and_level() -> None:
    levels = (random_map(16, 20, 3, 2), random_map(8, 10, 3, 2, seed=1), random_map(4, 5, 3, 2, seed=2))
    strides = (4.0, 8.0, 16.0)
    boxes = torch.rand(40, 4) * 40
    boxes[:, 2:] += boxes[:, :2]
    image, level = torch.randint(0, 2, (40,)), torch.randint(0, 3, (40,))
    pooled = prroi_pool(maps_of(*levels, strides=strides), boxes, image_index=image, level=level)
    for row in range(40):
        feature, stride = levels[level[row]][image[row]], strides[level[row]]
        expected = oracle(feature, boxes[row : row + 1], stride, 7)
        torch.testing.assert_close(pooled[row : row + 1].double(), expected, rtol=0, atol=FORWARD * span(feature))


GOLDEN = [
    ([[1, 2], [3, 4]], (0, 0, 1, 1), [[1.75, 2.25], [2.75, 3.25]], (2, 4, 2, 4)),
    (
        [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]],
        (0, 0, 3, 3),
        [[3.75, 6.916667], [10.083333, 13.25]],
        (3.333333, 6.666667, 3.333333, 6.666667),
    ),
]


@pytest.mark.parametrize(("feature", "box", "value", "gradient"), GOLDEN)
def test_published_vectors(feature: Any, box: Any, value: Any, gradient: Any) -> None:
    boxes = torch.tensor([box], dtype=torch.float32, requires_grad=True)
    pooled = prroi_pool(maps_of(torch.tensor([[feature]], dtype=torch.float32)), boxes, output_size=2, aligned=False)
    pooled.sum().backward()
    torch.testing.assert_close(pooled[0, 0], torch.tensor(value), rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes.grad, torch.tensor([gradient], dtype=torch.float32), rtol=0, atol=1e-5)


def test_one_cell_bins_between_cells_are_average_pooling() -> None:
    feature = random_map(8, 8, 5)
    pooled = prroi_pool(maps_of(feature, strides=(2.0,)), torch.tensor([[0.0, 0, 14, 14]]), aligned=False)
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(feature, 2, 1)[..., :7, :7])


def test_the_interpolant_fades_at_the_border() -> None:
    ones = maps_of(torch.ones(1, 1, 4, 4))
    box = torch.tensor([[0.0, 0, 4, 4]])
    original = prroi_pool(ones, box, output_size=4, aligned=False)[0, 0]
    centred = prroi_pool(ones, box, output_size=4)[0, 0]
    side = torch.tensor([1, 1, 1, 0.5])
    torch.testing.assert_close(original, side[:, None] * side)
    side = torch.tensor([0.875, 1, 1, 0.875])
    torch.testing.assert_close(centred, side[:, None] * side)


# ---- The laws. ----

_inner_box = st.tuples(st.floats(0.6, 9), st.floats(0.6, 9), st.floats(0.01, 6), st.floats(0.01, 4)).map(
    lambda v: torch.tensor([[v[0], v[1], v[0] + v[2], v[1] + v[3]]])
)


@settings(max_examples=25)
@given(box=_inner_box, value=st.floats(-100, 100))
def test_a_constant_map_pools_to_the_constant(box: Tensor, value: float) -> None:
    pooled = prroi_pool(maps_of(torch.full((1, 2, 14, 17), value)), box)
    torch.testing.assert_close(pooled, torch.full_like(pooled, value), rtol=5e-7, atol=0)


@settings(max_examples=25)
@given(box=_inner_box)
def test_a_linear_map_pools_to_its_value_at_the_centre_of_the_bin(box: Tensor) -> None:
    rows, columns = torch.arange(14.0)[:, None], torch.arange(17.0)
    pooled = prroi_pool(maps_of((2 * columns - 3 * rows + 5)[None, None]), box, output_size=5)[0, 0]
    x1, y1, x2, y2 = box[0].double() - 0.5
    place = (torch.arange(5, dtype=torch.float64) + 0.5) / 5
    expected = 2 * (x1 + (x2 - x1) * place) - 3 * (y1 + (y2 - y1) * place)[:, None] + 5
    torch.testing.assert_close(pooled.double(), expected, rtol=0, atol=3e-5)


@settings(max_examples=25)
@given(box=_inner_box, right=st.integers(0, 5), down=st.integers(0, 5), stride=st.sampled_from([1.0, 2.0, 16.0]))
def test_map_and_box_move_together(box: Tensor, right: int, down: int, stride: float) -> None:
    feature = random_map()
    moved = torch.nn.functional.pad(feature, (right, 0, down, 0))
    shift = torch.tensor([right, down, right, down])
    before = prroi_pool(maps_of(feature, strides=(stride,)), box * stride)
    after = prroi_pool(maps_of(moved, strides=(stride,)), (box + shift) * stride)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)  # the moved box is rounded anew


@settings(max_examples=25)
@given(box=_inner_box, factor=st.sampled_from([0.25, 2.0, 64.0]))
def test_box_and_stride_scale_together(box: Tensor, factor: float) -> None:
    feature = random_map()
    small = prroi_pool(maps_of(feature), box)
    large = prroi_pool(maps_of(feature, strides=(factor,)), box * factor)
    torch.testing.assert_close(small, large, rtol=0, atol=0)


@settings(max_examples=25)
@given(box=_cell_box.map(lambda b: torch.tensor([b])), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_pooling_is_linear_in_the_features(box: Tensor, a: float, b: float) -> None:
    one, two = random_map(), random_map(seed=1)
    together = prroi_pool(maps_of(a * one + b * two), box)
    apart = a * prroi_pool(maps_of(one), box) + b * prroi_pool(maps_of(two), box)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(box=_cell_box.map(lambda b: torch.tensor([b])), bins=st.integers(2, 9))
def test_the_bins_average_to_the_box(box: Tensor, bins: int) -> None:
    features = maps_of(random_map())
    many, one = prroi_pool(features, box, output_size=bins), prroi_pool(features, box, output_size=1)
    torch.testing.assert_close(many.mean((2, 3)), one[..., 0, 0], rtol=0, atol=5e-6)


@settings(max_examples=25)
@given(box=_cell_box.map(lambda b: torch.tensor([b])))
def test_mirrored_map_and_box_pool_to_mirrored_bins(box: Tensor) -> None:
    feature = random_map().double()
    box = box.double()
    mirrored = box.clone()
    mirrored[:, 0], mirrored[:, 2] = 17 - box[:, 2], 17 - box[:, 0]
    plain = prroi_pool(maps_of(feature), box)
    flipped = prroi_pool(maps_of(feature.flip(3)), mirrored)
    torch.testing.assert_close(plain, flipped.flip(3), rtol=0, atol=1e-8)


# ---- The gradients. ----


def gradient_error(boxes: Tensor, stride: float, step: float) -> float:
    """Largest error of the gradient to boxes, relative to the largest gradient; float32 against float64 differences."""
    feature = random_map()
    boxes = boxes.clone().requires_grad_()
    pooled = prroi_pool(maps_of(feature, strides=(stride,)), boxes)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(pooled, boxes, upstream)
    expected = np.array(
        [
            prroi_pool_gradient_reference(feature[0].double().numpy(), box, grad, step)
            for box, grad in zip(in_cells(boxes, stride), upstream.double().numpy(), strict=True)
        ]
    )
    return float(np.abs(found.numpy() * stride - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", [9, 3, 0.7, 0.05, 0.01])
def test_gradient_to_boxes(size: float) -> None:
    corner = torch.rand(6, 2) * 12
    boxes = torch.cat([corner, corner + size * (0.5 + torch.rand(6, 2))], 1)
    assert gradient_error(boxes * 8, 8.0, 1e-6) <= GRADIENT


def test_gradient_to_boxes_with_edges_on_cells() -> None:
    cells = torch.tensor([[0, 0, 7, 7], [2, 3, 9, 10], [-1, 4, 6, 12], [3, 3, 17, 14], [5, 2, 6, 3], [-7, -7, 21, 14]])
    assert gradient_error((cells + 0.5) * 4, 4.0, 1e-7) <= GRADIENT


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9])
def test_gradient_of_a_vanishing_box_keeps_its_digits(size: float) -> None:
    """Over a ridge: the mean of 1 - |x - 5| over [5 - p, 5 + q] is 1 - (p^2 + q^2) / (2 (p + q))."""
    ridge = torch.zeros(1, 1, 9, 11, dtype=torch.float64)
    ridge[..., 5] = 1
    p, q = size, 2 * size
    box = torch.tensor([[5 - p, 3.0, 5 + q, 3.0 + size]], dtype=torch.float64, requires_grad=True)
    pooled = prroi_pool(maps_of(ridge), box, output_size=1, aligned=False)
    pooled.sum().backward()
    assert pooled.item() == pytest.approx(1 - (p * p + q * q) / (2 * (p + q)), abs=1e-12)
    by_edge = [(p * (p + q) - (p * p + q * q) / 2) / (p + q) ** 2, -(q * (p + q) - (p * p + q * q) / 2) / (p + q) ** 2]
    assert box.grad is not None
    torch.testing.assert_close(box.grad[0, ::2], torch.tensor(by_edge, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(box.grad[0, 1::2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("aligned", [True, False])
def test_gradcheck_of_boxes_and_features(aligned: bool) -> None:
    feature = random_map(5, 6, 2).double().requires_grad_()
    whole = [[0, 0, 3, 3], [1, 1, 5, 4], [-2, 0, 2, 6], [1.5, 0.5, 4.5, 3.5], [0.5, 0.5, 1.5, 1.5]]
    scattered = [[0.31, 0.77, 2.13, 4.99], [-1.2, -3.4, 9.1, 8.7], [2.04, 2.03, 2.31, 2.4], [8, 8, 9, 9]]
    boxes = torch.tensor(whole + scattered, dtype=torch.float64, requires_grad=True)

    def pool(boxes: Tensor, feature: Tensor) -> Tensor:
        return prroi_pool(maps_of(feature), boxes, output_size=3, aligned=aligned)

    assert torch.autograd.gradcheck(pool, (boxes, feature), eps=1e-7, atol=1e-5)


def test_gradients_are_computed_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("nobody asked for this gradient")

    boxes = torch.tensor([[1.0, 2, 6, 7]])
    with monkeypatch.context() as patch:
        patch.setattr(portable, "backward_table", never)
        prroi_pool(maps_of(random_map()), boxes.requires_grad_()).sum().backward()
    monkeypatch.setattr(portable, "backward_boxes", never)
    monkeypatch.setattr(portable, "backward_kept", never)
    feature = random_map().requires_grad_()
    prroi_pool(maps_of(feature), boxes.detach()).sum().backward()
    assert feature.grad is not None


def test_gradient_to_features_adds_up_over_boxes_images_and_levels() -> None:
    levels = [random_map(6, 7, 2, 2).double().requires_grad_(), random_map(3, 4, 2, 2).double().requires_grad_()]
    boxes = torch.tensor([[0, 0, 5, 5], [1.0, 1, 6, 5], [1.0, 1, 6, 5], [2, 0, 9, 3.5]], dtype=torch.float64)
    image, level = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1])

    def pool(fine: Tensor, coarse: Tensor) -> Tensor:
        features = maps_of(fine, coarse, strides=(1.0, 2.0))
        return prroi_pool(features, boxes, image_index=image, level=level, output_size=2)

    assert torch.autograd.gradcheck(pool, tuple(levels))


def test_the_gradient_to_boxes_finds_the_taps_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    built, original = [], taps._outer
    monkeypatch.setattr(taps, "_outer", lambda *arguments: built.append(1) or original(*arguments))
    boxes = torch.tensor([[1.0, 2, 6, 7], [0.5, 3, 9, 8.2]])

    def slope() -> Tensor:
        built.clear()
        point = boxes.clone().requires_grad_()
        return torch.autograd.grad(prroi_pool(maps_of(random_map()), point).square().sum(), point)[0]

    kept = slope()
    assert len(built) == 1
    # More boxes than are handled at once are worth no such memory.
    monkeypatch.setattr(taps, "_CHUNK_TAPS", 1)
    found_again = slope()
    assert len(built) > 2
    torch.testing.assert_close(kept, found_again)
    # And without a gradient nothing is kept.
    monkeypatch.setattr(portable, "_profile", None)
    with torch.no_grad():
        prroi_pool(maps_of(random_map()), boxes.requires_grad_())
    prroi_pool(maps_of(random_map().requires_grad_()), boxes.detach())


def test_a_second_derivative_is_refused_not_wrong() -> None:
    boxes = torch.tensor([[1.0, 2, 6, 7]], requires_grad=True)
    (slope,) = torch.autograd.grad(prroi_pool(maps_of(random_map()), boxes).pow(2).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()


# ---- Hostile input. ----


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
    taken, original = [], taps._outer

    def counted(*arguments: Any) -> Any:
        taps = original(*arguments)
        taken.append(len(taps.row))
        return taps

    with monkeypatch.context() as patch:
        patch.setattr(taps, "_outer", counted)
        prroi_pool(maps_of(random_map(40, 60)), boxes)
    return sum(taken)


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
    boxes = torch.tensor(
        [[5.5, 4.5, 9, 9], [0.5, 0.5, 4.5, 3.5], [4.0, 3, 5, 5]]
    )  # beside, up to its cell, and over it
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


def test_levels_of_different_width_have_no_common_table() -> None:
    with pytest.raises(ValueError, match="same channels on every level"):
        FeaturePyramid.from_maps(maps_of(random_map(channels=2), random_map(channels=3), strides=(1.0, 2.0)))


# ---- Precisions and modes. ----


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_tables_are_pooled_in_float32_and_rounded_once(dtype: torch.dtype, step: float) -> None:
    feature = random_map().to(dtype)
    boxes = torch.tensor([[1.2, 2.3, 9.8, 7.1], [3.0, 3.0, 3.01, 3.01], [100.0, 100, 120, 130]], requires_grad=True)
    wide = prroi_pool(maps_of(feature.float()), boxes)
    narrow = prroi_pool(maps_of(feature), boxes)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wide, rtol=step, atol=1e-7)
    (slope,) = torch.autograd.grad(narrow.float().sum(), boxes)
    (expected,) = torch.autograd.grad(wide.sum(), boxes)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, expected)
    weights = maps_of(feature.clone().requires_grad_())
    prroi_pool(weights, boxes.detach()).float().sum().backward()
    assert weights.levels[0].grad is not None
    assert weights.levels[0].grad.dtype == dtype


def test_of_a_half_table_only_the_rows_touched_are_widened() -> None:
    table = random_map().to(torch.float16)[0].flatten(1).t().contiguous()
    row = torch.tensor([7, 3, 3, 200], dtype=torch.int32)
    features, place = portable._widened(table, row)
    assert features.dtype == torch.float32
    assert len(features) == 3
    assert torch.equal(features[place], table[row].float())
    assert portable._widened(table.float(), row)[1] is row


def test_half_boxes_are_widened_before_any_geometry() -> None:
    boxes = torch.tensor([[100.0, 50, 203, 99]], dtype=torch.float16)
    features = maps_of(random_map(), strides=(16.0,))
    torch.testing.assert_close(prroi_pool(features, boxes), prroi_pool(features, boxes.float()), rtol=0, atol=0)


def test_same_value_in_every_mode() -> None:
    features, boxes = maps_of(random_map()), torch.tensor([[1.2, 2.3, 9.8, 7.1]])
    plain = prroi_pool(features, boxes)
    with torch.no_grad():
        assert torch.equal(prroi_pool(features, boxes), plain)
    with torch.inference_mode():
        assert torch.equal(prroi_pool(features, boxes), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prroi_pool(features, boxes), plain)
    assert plain.is_contiguous(memory_format=torch.channels_last)


def test_a_table_made_in_inference_mode_can_be_differentiated_later() -> None:
    with torch.inference_mode():
        pyramid = FeaturePyramid.from_maps(maps_of(random_map() + 0))
    boxes = torch.tensor([[1.2, 2.3, 9.8, 7.1]], requires_grad=True)
    prroi_pool(pyramid, boxes).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.any()


def channels_last(feature: Tensor) -> Tensor:
    return feature.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("images", [1, 3])
def test_one_level_in_channels_last_memory_is_not_copied(images: int) -> None:
    feature = random_map(images=images)
    last = channels_last(feature)
    table = FeaturePyramid.from_maps(maps_of(last)).table
    assert table.data_ptr() == last.data_ptr()
    assert torch.equal(table, FeaturePyramid.from_maps(maps_of(feature)).table)
    boxes, index = torch.tensor([[1.2, 2.3, 9.8, 7.1]]).repeat(images, 1), torch.arange(images)
    for one, other in zip(*(prroi_pool(maps_of(f), boxes, image_index=index) for f in (feature, last)), strict=True):
        assert torch.equal(one, other)
    with torch.inference_mode():  # but what an ascent could not use is
        pyramid = FeaturePyramid.from_maps(maps_of(channels_last(feature) + 0))
    prroi_pool(pyramid, boxes.requires_grad_(), image_index=index).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_narrowing_on_the_way_is_a_convolution_before(layout: torch.memory_format, images: int) -> None:
    levels = [random_map(6, 9, 5, images), random_map(3, 4, 7, images, seed=1)]
    layers = [torch.nn.Conv2d(level.shape[1], 4, 1) for level in levels]
    maps = maps_of(*(level.contiguous(memory_format=layout) for level in levels), strides=(1.0, 2.0))
    narrow = [(layer.weight.flatten(1), layer.bias) for layer in layers]
    convolved = [layer(level) for layer, level in zip(layers, levels, strict=True)]
    expected = FeaturePyramid.from_maps(maps_of(*convolved, strides=(1.0, 2.0)))
    learning = FeaturePyramid.from_maps(maps, narrow)
    with torch.no_grad():
        given = FeaturePyramid.from_maps(maps, narrow)
    for pyramid in (learning, given):
        for field in ("table", "sizes", "offsets", "strides"):
            torch.testing.assert_close(getattr(pyramid, field), getattr(expected, field))
    assert not given.table.requires_grad
    if not images:
        return
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    upstream = torch.randn_like(expected.table)
    slopes = (torch.autograd.grad(table, weights, upstream) for table in (learning.table, expected.table))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_making_a_table_keeps_the_grad_mode() -> None:
    features = maps_of(random_map().requires_grad_())
    assert FeaturePyramid.from_maps(features).table.requires_grad
    with torch.no_grad():
        assert not FeaturePyramid.from_maps(features).table.requires_grad


def op_arguments() -> list[Any]:
    pyramid = FeaturePyramid.from_maps(maps_of(random_map(5, 6, 2, images=2)))
    boxes = torch.tensor([[1.2, 2.3, 3.8, 4.1], [0.0, 0, 6, 5], [4.0, 4, 3, 3]])
    index = torch.tensor([0, 1, 1], dtype=torch.int32)
    return [pyramid.table, pyramid.sizes, pyramid.offsets, pyramid.strides, boxes, index]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from opcheck's own clones
def test_the_operators_keep_their_promises_to_torch() -> None:
    arguments = op_arguments()
    grad = torch.randn(3, 2, 2, 2)
    torch.library.opcheck(operator._grad_table, (grad, *arguments, 0.5))
    for keep in (True, False):
        _, kept = operator.pool(*arguments, 2, 0.5, keep)
        torch.library.opcheck(operator._grad_boxes, (grad, *arguments, 0.5, kept))
    arguments[0].requires_grad_()
    arguments[4].requires_grad_()
    for keep in (True, False):
        torch.library.opcheck(operator.pool, (*arguments, 2, 0.5, keep))


def test_the_operator_refuses_an_index_outside_its_maps() -> None:
    arguments = op_arguments()
    arguments[5] = torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"must lie in \[0, 1\]"):
        operator.pool(*arguments, 2, 0.5, False)


def test_compiles_without_a_graph_break() -> None:
    def value(feature: Tensor, boxes: Tensor, image: Tensor) -> Tensor:
        return prroi_pool(maps_of(feature), boxes, image_index=image, output_size=3).square().sum()

    def run(function: Any) -> list[Tensor]:
        feature, boxes = random_map(images=2).requires_grad_(), torch.tensor([[1.2, 2, 9, 7.1], [0.0, 0, 6, 5]])
        result = function(feature, boxes.requires_grad_(), torch.tensor([0, 1]))
        return [result, *torch.autograd.grad(result, (feature, boxes))]

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(value), run(compiled), strict=True):
        torch.testing.assert_close(one, other)


def test_pyramids_join_with_maps_of_their_own_size() -> None:
    one, two = random_map(6, 9, 2), random_map(11, 4, 2, seed=1)
    both = FeaturePyramid.concat([FeaturePyramid.from_maps(maps_of(one)), FeaturePyramid.from_maps(maps_of(two))])
    box = torch.tensor([[0.7, 0.9, 3.5, 5.5]])
    for image, feature in enumerate((one, two)):
        alone = prroi_pool(maps_of(feature), box)
        assert torch.equal(prroi_pool(both, box, image_index=torch.tensor([image])), alone)
    with pytest.raises(ValueError, match="equally many levels"):
        FeaturePyramid.concat([both, FeaturePyramid.from_maps(maps_of(one, one, strides=(1.0, 2.0)))])


# ---- Levels. ----


def test_levels_follow_the_rule_of_fpn() -> None:
    sides = torch.tensor([1.0, 111, 112, 223, 224, 447, 448, 9000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    assert assign_levels(boxes, (4.0, 8.0, 16.0, 32.0)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(torch.tensor([[5.0, 5, 5, 5], [9.0, 9, 1, 1]]), (4.0, 8.0)).tolist() == [0, 0]
    assert assign_levels(torch.zeros(0, 4), (4.0, 8.0)).shape == (0,)
