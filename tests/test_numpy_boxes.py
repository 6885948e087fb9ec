"""The IoU of boxes in numpy is that of torch, and needs none."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner import boxes as torch_boxes
from iou_refiner.numpy_boxes import corners, iou_of_corners, paired_iou, pairwise_cover, pairwise_iou
from tests.kit.reference import box_iou

NAN, INF = float("nan"), float("inf")
_edge = st.one_of(st.integers(-3, 8).map(float), st.floats(-1000, 1000, width=32))
_box = st.tuples(_edge, _edge, _edge, _edge)
_boxes = st.lists(_box, max_size=6)
_dtype = st.sampled_from([np.float32, np.float64])


def rows(boxes: list[tuple[float, ...]], dtype: type) -> np.ndarray:
    return np.array(boxes, dtype).reshape(-1, 4)


@settings(max_examples=80)
@given(a=_boxes, b=_boxes, dtype=_dtype)
def test_pairwise_iou_is_that_of_torch(a: list[tuple[float, ...]], b: list[tuple[float, ...]], dtype: type) -> None:
    one, two = rows(a, dtype), rows(b, dtype)
    iou = pairwise_iou(one, two)
    assert iou.dtype == dtype
    assert iou.shape == (len(a), len(b))
    expected = torch_boxes.pairwise_iou(torch.from_numpy(one), torch.from_numpy(two)).numpy()
    np.testing.assert_array_equal(iou, expected)
    assert ((iou >= 0) & (iou <= 1)).all()


@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(_box, _box), max_size=8), dtype=_dtype)
def test_paired_iou_is_that_of_torch_and_the_diagonal(
    pairs: list[tuple[tuple[float, ...], tuple[float, ...]]], dtype: type
) -> None:
    one, two = (rows([pair[side] for pair in pairs], dtype) for side in (0, 1))
    iou = paired_iou(one, two)
    expected = torch_boxes.paired_iou(torch.from_numpy(one), torch.from_numpy(two)).numpy()
    np.testing.assert_array_equal(iou, expected)
    np.testing.assert_array_equal(iou, pairwise_iou(one, two).diagonal())


@settings(max_examples=40)
@given(a=_boxes, b=_boxes)
def test_by_corners_it_is_the_textbooks(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> None:
    one, two = rows(a, np.float32), rows(b, np.float32)
    (low_a, high_a, area_a), (low_b, high_b, area_b) = corners(one), corners(two)
    iou = iou_of_corners(
        low_a[:, :, None], high_a[:, :, None], low_b[:, None], high_b[:, None], area_a[:, None], area_b
    )  # fmt: skip
    expected = [[box_iou(tuple(p), tuple(q)) for q in two.tolist()] for p in one.tolist()]
    np.testing.assert_allclose(iou, np.array(expected).reshape(len(a), len(b)), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(area_a, torch_boxes.box_area(torch.from_numpy(one)).numpy())


@settings(max_examples=60)
@given(a=_boxes, b=_boxes, dtype=_dtype)
def test_cover_is_the_share_of_the_first_box(
    a: list[tuple[float, ...]], b: list[tuple[float, ...]], dtype: type
) -> None:
    one, two = rows(a, dtype), rows(b, dtype)
    cover = pairwise_cover(one, two)
    assert cover.dtype == dtype
    assert cover.shape == (len(a), len(b))
    for i, (x1, y1, x2, y2) in enumerate(one.tolist()):
        for j, (u1, v1, u2, v2) in enumerate(two.tolist()):
            width, height = min(x2, u2) - max(x1, u1), min(y2, v2) - max(y1, v1)
            empty = width <= 0 or height <= 0 or x2 <= x1 or y2 <= y1
            expected = 0.0 if empty else width * height / ((x2 - x1) * (y2 - y1))
            assert cover[i, j] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("box", [(NAN, 0, 9, 9), (0, 0, INF, 9), (-INF, 0, INF, 9), (3, 3, 3, 8), (9, 9, 1, 1)])
def test_broken_boxes_warn_of_nothing(box: tuple[float, ...]) -> None:
    broken, sound = rows([box], np.float64), rows([(0, 0, 9, 9)], np.float64)
    for overlap in (pairwise_iou, paired_iou, pairwise_cover):
        for value in (*overlap(broken, sound).flat, *overlap(sound, broken).flat):
            assert not value > 1
    if all(map(np.isfinite, box)):
        assert pairwise_iou(broken, sound) == pairwise_cover(broken, sound) == 0


def test_nothing_in_nothing_out() -> None:
    none, three = np.zeros((0, 4)), np.zeros((3, 4))
    assert pairwise_iou(none, three).shape == pairwise_cover(none, three).shape == (0, 3)
    assert pairwise_iou(three, none).shape == pairwise_cover(three, none).shape == (3, 0)
    assert paired_iou(none, none).shape == (0,)


def test_it_needs_no_torch() -> None:
    code = "import sys, iou_refiner.numpy_boxes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
