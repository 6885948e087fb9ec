"""Accuracy of the portable PrRoIPool in float32, for ever smaller boxes, against the float64 oracle of the tests.

    python -m scripts.bench.pooling_accuracy

About 20 s on one core. Expected: forward error below 2e-6 of the map's range and box gradient error below 1e-5 of the
largest gradient in every row. The oracle of the gradient, central differences, is itself only good to about 1e-6.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from iou_refiner.pooling.functional import prroi_pool
from iou_refiner.structures import FeatureMaps
from tests.kit.reference import prroi_pool_gradient_reference, prroi_pool_reference

SIZES = (30, 7, 0.7, 0.05, 0.01)  # of a box, in cells
HEIGHT, WIDTH, CHANNELS, STRIDE, BINS = 48, 64, 4, 8.0, 7
FORWARD, GRADIENT = 2e-6, 1e-5


def errors(size: float, count: int = 20) -> tuple[float, float]:
    """Largest error of the value, by the range of the map, and of the box gradient, by the largest gradient."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([WIDTH - size, HEIGHT - size])
    boxes = (torch.cat([corner, corner + size], 1) * STRIDE).requires_grad_()
    pooled = prroi_pool(FeatureMaps((feature,), (STRIDE,), ((HEIGHT * 8, WIDTH * 8),)), boxes, output_size=BINS)
    upstream = torch.randn(pooled.shape, generator=generator)
    (slope,) = torch.autograd.grad(pooled, boxes, upstream)

    exact = feature[0].double().numpy()
    cells = boxes.detach().double().numpy() / STRIDE - 0.5
    values = np.array([prroi_pool_reference(exact, box, BINS) for box in cells])
    slopes = np.array(
        [
            prroi_pool_gradient_reference(exact, box, grad)
            for box, grad in zip(cells, upstream.double().numpy(), strict=True)
        ]
    )
    forward = np.abs(pooled.detach().numpy() - values).max() / (exact.max() - exact.min())
    backward = np.abs(slope.numpy() * STRIDE - slopes).max() / np.abs(slopes).max()
    return float(forward), float(backward)


def main() -> int:
    torch.set_num_threads(1)
    print(f"{'box (cells)':>11}  {'forward / range':>15}  {'box gradient / largest':>22}")
    passed = True
    for size in SIZES:
        forward, backward = errors(size)
        passed &= forward <= FORWARD and backward <= GRADIENT
        print(f"{size:>11g}  {forward:>15.1e}  {backward:>22.1e}")
    print(f"limits: {FORWARD:g} and {GRADIENT:g}: {'met' if passed else 'MISSED'}")
    return 0 if passed else 4


if __name__ == "__main__":
    sys.exit(main())
