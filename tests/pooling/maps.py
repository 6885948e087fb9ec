"""Maps, boxes and the oracle that the tests of pooling share."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.structures import FeatureMaps
from tests.kit.reference import prroi_pool_reference

# The contract: the largest error of a pooled value, relative to the range of the map.
FORWARD = 2e-6


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
CELL_BOXES = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), _place, _place, _size, _size)
BROKEN_BOXES = st.sampled_from(
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
