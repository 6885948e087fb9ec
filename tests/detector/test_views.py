"""Views of an image: windows that stay inside it, functions of image and number, boxes that follow the pixels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iou_refiner.detector.views import View

sides = st.integers(1, 300)


@given(st.integers(-5, 10**9), sides, sides, st.integers(0, 20))
def test_windows_lie_in_the_image_and_depend_on_image_and_number_alone(image_id, height, width, number):
    view = View.of(image_id, (height, width), number)
    assert view == View.of(image_id, (height, width), number)
    assert 0 <= view.left < view.left + view.width <= width
    assert 0 <= view.top < view.top + view.height <= height


def test_first_the_image_then_its_mirror_image_then_windows_that_differ():
    assert View.of(7, (50, 80), 0) == View(0, 0, 80, 50)
    assert View.of(7, (50, 80), 1) == View(0, 0, 80, 50, mirrored=True)
    views = {View.of(image_id, (50, 80), number) for image_id in range(30) for number in range(2, 6)}
    assert len(views) > 110
    assert 0.35 < np.mean([view.mirrored for view in views]) < 0.65


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_follow_the_pixels(mirrored):
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[12:20, 25:33] = 255
    view = View(10, 5, 40, 30, mirrored)
    shown = view.pixels(rgb)
    assert shown.shape == (30, 40, 3)
    assert shown.flags["C_CONTIGUOUS"]
    rows, cols = np.nonzero(shown[:, :, 0])
    box = view.boxes(torch.tensor([[25.0, 12.0, 33.0, 20.0]]))[0].tolist()
    assert box == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
