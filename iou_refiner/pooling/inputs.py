"""What every backend of PrRoIPool is given, described once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PoolInputs(NamedTuple):
    """R boxes, and the M feature maps they are pooled from.

    A map of ``H x W`` cells is ``H * W`` consecutive rows of the table, row by row. An empty or inverted box pools to 0
    with gradient 0. A box that is not finite pools to NaN with gradient NaN, and touches no feature.

    Attributes:
        table: (rows, C) features of all maps, channels last, contiguous.
        sizes: (M, 2) int32, height and width of each map in cells.
        offsets: (M,) int64, the first row of each map.
        strides: (M,) float32, network pixels per cell of each map.
        boxes: (R, 4) float32 or float64, xyxy in network pixels.
        map_index: (R,) int32, the map of each box.
        shift: cell ``i`` is centred at ``(i + shift) * stride``.
    """

    table: Tensor
    sizes: Tensor
    offsets: Tensor
    strides: Tensor
    boxes: Tensor
    map_index: Tensor
    shift: float
