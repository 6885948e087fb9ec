"""Slow, obvious oracles: nothing here shares code or formulas with the package."""

from __future__ import annotations

import numpy as np


def hat_mean(low: float, high: float, cell: int) -> float:
    """Mean over [low, high] of max(0, 1 - |t - cell|), piecewise by the trapezoid rule, exact for a linear function."""
    knots = sorted({low, high, *(k for k in (cell - 1.0, float(cell), cell + 1.0) if low < k < high)})
    values = [max(0.0, 1.0 - abs(t - cell)) for t in knots]
    area = sum((b - a) * (u + v) / 2 for a, b, u, v in zip(knots, knots[1:], values, values[1:], strict=False))
    return area / (high - low)


def prroi_pool_reference(feature: np.ndarray, box: np.ndarray, output_size: int) -> np.ndarray:
    """PrRoIPool of one box in cells, float64. feature: (C, H, W); box: (4,) xyxy in cells; returns (C, P, P)."""
    channels, height, width = feature.shape
    out = np.zeros((channels, output_size, output_size))
    x1, y1, x2, y2 = (float(v) for v in box)
    if not np.isfinite([x1, y1, x2, y2]).all():
        return np.full_like(out, np.nan)
    if x2 <= x1 or y2 <= y1:
        return out
    xs, ys = np.linspace(x1, x2, output_size + 1), np.linspace(y1, y2, output_size + 1)
    wx = np.array([[hat_mean(xs[i], xs[i + 1], k) for k in range(width)] for i in range(output_size)])
    wy = np.array([[hat_mean(ys[i], ys[i + 1], k) for k in range(height)] for i in range(output_size)])
    return np.einsum("ih,chw,jw->cij", wy, feature.astype(np.float64), wx)
