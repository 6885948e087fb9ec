"""Slow, obvious oracles: nothing here shares code or formulas with the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Box = tuple[float, float, float, float]


# ---- Precise RoI Pooling ----


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


def prroi_pool_gradient_reference(
    feature: np.ndarray, box: np.ndarray, grad: np.ndarray, step: float = 1e-6
) -> np.ndarray:
    """Central differences of ``sum(grad * pooled)`` by the edges of one box in cells, float64, (4,)."""
    out = np.zeros(4)
    for edge in range(4):
        for sign in (-1, 1):
            moved = np.array(box, dtype=np.float64)
            moved[edge] += sign * step
            out[edge] += sign * float((grad * prroi_pool_reference(feature, moved, grad.shape[-1])).sum())
    return out / (2 * step)


def interpolate(feature: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear value of a map (C, H, W) at a point in cells; cells outside the map are 0."""
    channels, height, width = feature.shape
    left, top = math.floor(x), math.floor(y)
    out = np.zeros(channels)
    for row, wy in ((top, top + 1 - y), (top + 1, y - top)):
        for column, wx in ((left, left + 1 - x), (left + 1, x - left)):
            if 0 <= row < height and 0 <= column < width:
                out += wy * wx * feature[:, row, column]
    return out


def sampled_mean(feature: np.ndarray, box: Box, samples: int) -> np.ndarray:
    """Mean of the interpolant over a box by the midpoint rule with ``samples`` points per side, (C,)."""
    x1, y1, x2, y2 = box
    places = [(k + 0.5) / samples for k in range(samples)]
    points = [interpolate(feature, x1 + (x2 - x1) * u, y1 + (y2 - y1) * v) for u in places for v in places]
    return np.mean(points, axis=0)


# ---- Boxes and suppression ----


def box_iou(a: Box, b: Box) -> float:
    """IoU of two boxes as the textbook has it; 0 where a box is empty or a coordinate not finite."""
    if not all(map(math.isfinite, (*a, *b))):
        return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def iou_guided_nms_reference(
    boxes: list[Box], scores: list[float], ranking: list[float], labels: list[int], threshold: float
) -> list[tuple[int, float]]:
    """Algorithm 1 as printed, per class: (index, merged score) of the boxes that stay, best rank first.

    Ties: the higher score, then the smaller index.
    """
    waiting = set(range(len(boxes)))
    detections = []
    while waiting:
        best = min(waiting, key=lambda i: (-ranking[i], -scores[i], i))
        waiting.remove(best)
        score = scores[best]
        for other in sorted(waiting):
            if labels[other] == labels[best] and box_iou(boxes[best], boxes[other]) > threshold:
                score = max(score, scores[other])
                waiting.remove(other)
        detections.append((best, score))
    return detections


def soft_nms_reference(
    boxes: list[Box], scores: list[float], labels: list[int], decay: Callable[[float], float], min_score: float
) -> list[float]:
    """New scores of all boxes: the best one left takes its turn and decays those left, while it reaches min_score."""
    new = list(scores)
    for label in set(labels):
        waiting = [i for i in range(len(boxes)) if labels[i] == label]
        while waiting:
            best = max(waiting, key=lambda i: (new[i], -i))
            if new[best] < min_score:
                break
            waiting.remove(best)
            for other in waiting:
                new[other] *= decay(box_iou(boxes[best], boxes[other]))
    return new


# ---- Refinement ----


def refine_paper_reference(
    score: Callable[[list[float]], float],
    gradient: Callable[[list[float]], list[float]],
    boxes: list[list[float]],
    *,
    steps: int,
    step_size: float,
    early_stop: float,
    degeneration: float,
) -> list[list[float]]:
    """Algorithm 2 as printed, one box and one coordinate at a time."""
    boxes = [list(box) for box in boxes]
    stopped: set[int] = set()
    for _ in range(steps):
        for index, box in enumerate(boxes):
            if index in stopped:
                continue
            slope, previous = gradient(box), score(box)
            width, height = box[2] - box[0], box[3] - box[1]
            for edge, size in enumerate((width, height, width, height)):
                box[edge] += step_size * slope[edge] * size
            new = score(box)
            if abs(previous - new) < early_stop or new - previous < degeneration:
                stopped.add(index)
    return boxes
