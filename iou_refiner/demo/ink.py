"""A digit as a set of points, which an affine map carries into an image with an exact box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iou_refiner.checks import require
from iou_refiner.coco.data import FloatArray

_INK = 0.5  # of black
_FINE = 6  # samples of the interpolated digit per pixel of the original, per axis
_COVERAGE = 4  # samples per image pixel and axis, whose share inside the ink is the pixel's opacity


@dataclass(frozen=True, eq=False)
class Ink:
    """A digit as a set of points, those where ``fine``, interpolated linearly, is at least one half.

    Args:
        fine: (m, m) float64, the digit interpolated at :data:`_FINE` samples a pixel.
        outline: (k, 2) float64 ``(x, y)`` points on the border of the set, in pixels of the digit.
    """

    fine: FloatArray
    outline: FloatArray

    @classmethod
    def of(cls, digit: FloatArray) -> Ink:
        """Of a digit (28, 28) float64, 0 for paper to 1 for black."""
        transform = require("skimage.transform", extra="demo", purpose="The demo")
        offset = 0.5 / _FINE - 0.5
        to_digit = np.array([[1 / _FINE, 0, offset], [0, 1 / _FINE, offset], [0, 0, 1]])
        shape = tuple(side * _FINE for side in digit.shape)
        fine = transform.warp(digit, to_digit, output_shape=shape, order=3)
        outline = np.concatenate([_crossings(fine), _crossings(fine.T)[:, ::-1]])
        return cls(fine, (outline + 0.5) / _FINE)

    def extent(self, linear: FloatArray) -> FloatArray:
        """The box ``(x1, y1, x2, y2)`` of the set under a linear map (2, 2)."""
        points = self.outline @ linear.T
        return np.concatenate([points.min(0), points.max(0)])

    def coverage(
        self, linear: FloatArray, shift: FloatArray, window: tuple[int, int, int, int], samples: int = _COVERAGE
    ) -> FloatArray:
        """The share of each pixel that lies in the set.

        Args:
            linear, shift: (2, 2) and (2,), the map ``linear @ point + shift`` from pixels of the digit to the image.
            window: ``(left, top, right, bottom)``, the pixels wanted.
            samples: per pixel and axis.

        Returns:
            (bottom - top, right - left) in [0, 1].
        """
        transform = require("skimage.transform", extra="demo", purpose="The demo")
        left, top, right, bottom = window
        # From the index of a sample to the image, to the digit, to the index in `fine`; samples and pixels are centred.
        corner = np.array([left, top]) + 0.5 / samples
        back = np.linalg.inv(linear) * _FINE
        to_fine = np.eye(3)
        to_fine[:2, :2] = back / samples
        to_fine[:2, 2] = back @ (corner - shift) - 0.5
        shape = ((bottom - top) * samples, (right - left) * samples)
        inside = transform.warp(self.fine, to_fine, output_shape=shape, order=1) >= _INK
        share: FloatArray = inside.reshape(bottom - top, samples, right - left, samples).mean((1, 3))
        return share


def _crossings(fine: FloatArray) -> FloatArray:
    """Points ``(x, y)``, in array indices, where the border of the ink passes between horizontal neighbours."""
    left, right = fine[:, :-1], fine[:, 1:]
    row, column = np.nonzero((left >= _INK) != (right >= _INK))
    before, after = left[row, column], right[row, column]
    return np.stack([column + (_INK - before) / (after - before), row], 1)
