"""Precise RoI Pooling against slow oracles, and by its laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.pooling.functional import prroi_pool
from tests.kit.reference import prroi_pool_reference, sampled_mean
from tests.pooling.maps import BROKEN_BOXES, CELL_BOXES, FORWARD, maps_of, oracle, random_map, span

# ---- The value. ----


def test_the_oracle_itself_agrees_with_plain_sampling() -> None:
    feature = random_map(6, 5, 2)[0].double().numpy()
    for box in [(0.3, 0.4, 2.9, 3.1), (-2.0, 1.0, 3.0, 7.5), (1.0, 1.0, 2.0, 2.0)]:
        whole = prroi_pool_reference(feature, np.array(box), 1)[:, 0, 0]
        np.testing.assert_allclose(whole, sampled_mean(feature, box, 80), atol=2e-4)


@settings(max_examples=60)
@given(
    cells=st.lists(st.one_of(CELL_BOXES, BROKEN_BOXES), max_size=6),
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


# Below about 1e-38 floats lose digits, and no sum of them is right to one part in two million.
_normal = st.floats(1e-30, 100)


@settings(max_examples=25)
@given(box=_inner_box, value=st.just(0.0) | _normal | _normal.map(lambda value: -value))
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
@given(box=CELL_BOXES.map(lambda b: torch.tensor([b])), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_pooling_is_linear_in_the_features(box: Tensor, a: float, b: float) -> None:
    one, two = random_map(), random_map(seed=1)
    together = prroi_pool(maps_of(a * one + b * two), box)
    apart = a * prroi_pool(maps_of(one), box) + b * prroi_pool(maps_of(two), box)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(box=CELL_BOXES.map(lambda b: torch.tensor([b])), bins=st.integers(2, 9))
def test_the_bins_average_to_the_box(box: Tensor, bins: int) -> None:
    features = maps_of(random_map())
    many, one = prroi_pool(features, box, output_size=bins), prroi_pool(features, box, output_size=1)
    torch.testing.assert_close(many.mean((2, 3)), one[..., 0, 0], rtol=0, atol=5e-6)


@settings(max_examples=25)
@given(box=CELL_BOXES.map(lambda b: torch.tensor([b])))
def test_mirrored_map_and_box_pool_to_mirrored_bins(box: Tensor) -> None:
    feature = random_map().double()
    box = box.double()
    mirrored = box.clone()
    mirrored[:, 0], mirrored[:, 2] = 17 - box[:, 2], 17 - box[:, 0]
    plain = prroi_pool(maps_of(feature), box)
    flipped = prroi_pool(maps_of(feature.flip(3)), mirrored)
    torch.testing.assert_close(plain, flipped.flip(3), rtol=0, atol=1e-8)
