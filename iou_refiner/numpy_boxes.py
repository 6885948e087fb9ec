"""IoU of boxes in numpy, for code that must not wait for torch, and for small arrays, where numpy's calls cost less.

Boxes are xyxy. :func:`iou_of_corners` takes them axis by axis, which is fastest; the other functions take rows of four.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[Any]  # float32 or float64, kept as given


def iou_of_corners(
    low_a: FloatArray, high_a: FloatArray, low_b: FloatArray, high_b: FloatArray, area_a: FloatArray, area_b: FloatArray
) -> FloatArray:
    """IoU of boxes given by their corners and areas, whatever shapes broadcast.

    Args:
        low_a, high_a: (2, ...) x and y of the top left and bottom right corners; an empty or inverted box meets none.
        low_b, high_b: likewise.
        area_a, area_b: (...) areas, 0 for empty boxes.

    Returns:
        (...) in [0, 1].
    """
    common = intersection(low_a, high_a, low_b, high_b)
    union = area_a + area_b - common
    iou: FloatArray = common / np.maximum(union, np.finfo(union.dtype).tiny)
    return iou


def intersection(low_a: FloatArray, high_a: FloatArray, low_b: FloatArray, high_b: FloatArray) -> FloatArray:
    """Area (...) that two boxes share; arguments as :func:`iou_of_corners`."""
    size = np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0)
    area: FloatArray = size[0] * size[1]
    return area


def corners(boxes: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The top left corners (2, N), the bottom right corners (2, N) and the areas (N,) of boxes (N, 4)."""
    low, high = boxes[:, :2].T, boxes[:, 2:].T
    size = np.maximum(high - low, 0)
    return low, high, size[0] * size[1]


@np.errstate(over="ignore", invalid="ignore")  # boxes beyond all bounds meet nothing
def paired_iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """IoU (N,) of row ``i`` of ``a`` with row ``i`` of ``b``, both (N, 4)."""
    low_a, high_a, area_a = corners(a)
    low_b, high_b, area_b = corners(b)
    return iou_of_corners(low_a, high_a, low_b, high_b, area_a, area_b)


@np.errstate(over="ignore", invalid="ignore")  # boxes beyond all bounds meet nothing
def pairwise_iou(a: FloatArray, b: FloatArray) -> FloatArray:
    """IoU (N, M) of every row of ``a`` (N, 4) with every row of ``b`` (M, 4)."""
    low_a, high_a, area_a = corners(a)
    low_b, high_b, area_b = corners(b)
    low_a, high_a, area_a = low_a[:, :, None], high_a[:, :, None], area_a[:, None]
    return iou_of_corners(low_a, high_a, low_b[:, None], high_b[:, None], area_a, area_b)


@np.errstate(over="ignore", invalid="ignore")  # boxes beyond all bounds meet nothing
def pairwise_cover(a: FloatArray, b: FloatArray) -> FloatArray:
    """The share (N, M) of every box of ``a`` (N, 4) that lies in each box of ``b`` (M, 4); 0 for empty boxes."""
    low_a, high_a, area_a = corners(a)
    low_b, high_b, _ = corners(b)
    common = intersection(low_a[:, :, None], high_a[:, :, None], low_b[:, None], high_b[:, None])
    cover: FloatArray = common / np.maximum(area_a, np.finfo(area_a.dtype).tiny)[:, None]
    return cover
