"""PrRoIPool and its gradients in float64 by dense matrices: ``pooled = Wy F Wx'``, derivatives by the quotient rule.

Slow and obvious, and not the formulas of the kernels: weights come from the antiderivative of the hat function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _hat(t: Array) -> Array:
    return np.maximum(0.0, 1.0 - np.abs(t))


def _hat_integral(t: Array) -> Array:
    t = np.clip(t, -1.0, 1.0)
    return t - t * np.abs(t) / 2


@dataclass(frozen=True)
class Axis:
    """Weights (P, L) of all cells in all bins along one axis, and their derivatives by the two edges, in cells."""

    weight: Array
    low: Array
    high: Array


def axis(low: float, high: float, cells: int, bins: int) -> Axis:
    """The dense weights of ``[low, high]``, in cells, on a map of ``cells``."""
    part = np.arange(bins + 1) / bins
    edges = low + (high - low) * part
    distance = edges[:, None] - np.arange(cells)  # (P + 1, L)
    width = (high - low) / bins
    weight = np.diff(_hat_integral(distance), axis=0) / width
    by_start = (weight - _hat(distance[:-1])) / width
    by_end = (_hat(distance[1:]) - weight) / width
    start, end = part[:-1, None], part[1:, None]
    return Axis(weight, by_start * (1 - start) + by_end * (1 - end), by_start * start + by_end * end)


@dataclass(frozen=True)
class Case:
    """:class:`iou_refiner.pooling.inputs.PoolInputs` as float64 arrays."""

    table: Array
    sizes: NDArray[np.int32]
    offsets: NDArray[np.int64]
    strides: Array
    boxes: Array
    map_index: NDArray[np.int32]
    shift: float

    def axes(self, box: int, bins: int) -> tuple[Axis, Axis] | None:
        """The axes y and x of a box, or None if it is empty."""
        index = self.map_index[box]
        x1, y1, x2, y2 = self.boxes[box] / self.strides[index] - self.shift
        if x2 <= x1 or y2 <= y1:
            return None
        height, width = self.sizes[index]
        return axis(y1, y2, height, bins), axis(x1, x2, width, bins)

    def rows(self, box: int) -> slice:
        """The rows of the table that hold the map of a box."""
        index = self.map_index[box]
        return slice(self.offsets[index], self.offsets[index] + self.sizes[index].prod())

    def forward(self, bins: int) -> Array:
        """(R, P, P, C)."""
        out = np.zeros((len(self.boxes), bins, bins, self.table.shape[1]))
        for box in range(len(self.boxes)):
            if axes := self.axes(box, bins):
                feature = self.table[self.rows(box)].reshape(*self.sizes[self.map_index[box]], -1)
                out[box] = np.einsum("ih,hwc,jw->ijc", axes[0].weight, feature, axes[1].weight)
        return out

    def backward_boxes(self, grad: Array) -> Array:
        """(R, 4) in pixels."""
        out = np.zeros((len(self.boxes), 4))
        for box in range(len(self.boxes)):
            if axes := self.axes(box, grad.shape[1]):
                y, x = axes
                feature = self.table[self.rows(box)].reshape(*self.sizes[self.map_index[box]], -1)
                inner = np.einsum("hwc,ijc->ihjw", feature, grad[box])
                pairs = ((y.weight, x.low), (y.low, x.weight), (y.weight, x.high), (y.high, x.weight))
                out[box] = [np.einsum("ihjw,ih,jw->", inner, wy, wx) for wy, wx in pairs]
                out[box] /= self.strides[self.map_index[box]]
        return out

    def backward_table(self, grad: Array) -> Array:
        """(rows, C)."""
        out = np.zeros_like(self.table)
        for box in range(len(self.boxes)):
            if axes := self.axes(box, grad.shape[1]):
                spread = np.einsum("ih,ijc,jw->hwc", axes[0].weight, grad[box], axes[1].weight)
                out[self.rows(box)] += spread.reshape(-1, spread.shape[2])
        return out
