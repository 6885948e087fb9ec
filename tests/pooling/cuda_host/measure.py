"""What is claimed of the kernels, measured on the host: accuracy by size of box, and loads per output.

Shared by the tests, which hold the limits, and by scripts/bench/kernel_report.py, which prints the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from iou_refiner.pooling import cuda_kernels
from iou_refiner.pooling.inputs import PoolInputs
from tests.pooling.cuda_host.oracle import Case

HEIGHT, WIDTH, STRIDE, BINS = 200, 334, 8.0, 7


@dataclass(frozen=True)
class Accuracy:
    """Worst errors against float64."""

    forward: float  # absolute, features in [-4, 4]
    constant: float  # absolute, on a map of ones
    gradient: float  # of the boxes, relative to the largest of the case


def boxes_of(size: float, count: int, rng: np.random.Generator) -> Tensor:
    """Boxes of ``size`` cells, give or take a fifth, inside the map and clear of its border."""
    sides = size * rng.uniform(1 / 1.2, 1.2, (count, 2))
    low = rng.uniform(1, [WIDTH - 2, HEIGHT - 2] - sides, (count, 2))
    return torch.from_numpy(np.concatenate([low, low + sides], 1) * STRIDE).float()


def one_map(table: Tensor, boxes: Tensor) -> PoolInputs:
    """Boxes on a single map."""
    sizes = torch.tensor([[HEIGHT, WIDTH]], dtype=torch.int32)
    index = torch.zeros(len(boxes), dtype=torch.int32)
    return PoolInputs(table, sizes, torch.zeros(1, dtype=torch.int64), torch.tensor([STRIDE]), boxes, index, 0.5)


def case_of(inputs: PoolInputs) -> Case:
    """The same inputs for the oracle."""
    *tensors, shift = inputs
    return Case(*(item.double().numpy() if item.is_floating_point() else item.numpy() for item in tensors), shift)


def accuracy(size: float, count: int = 40) -> Accuracy:
    """Errors of the installed kernels on boxes of ``size`` cells. Needs the variant (float32, 7, 4)."""
    rng = np.random.default_rng(7)
    table = torch.from_numpy(rng.uniform(-4, 4, (HEIGHT * WIDTH, 4))).float()
    inputs = one_map(table, boxes_of(size, count, rng))
    grad = torch.from_numpy(rng.uniform(-1, 1, (count, BINS, BINS, 4))).float()
    case = case_of(inputs)
    gradient = case.backward_boxes(grad.double().numpy())
    ones = cuda_kernels.forward(inputs._replace(table=torch.ones_like(table)), BINS)
    return Accuracy(
        np.abs(cuda_kernels.forward(inputs, BINS).numpy() - case.forward(BINS)).max(),
        (ones - 1).abs().max().item(),
        np.abs(cuda_kernels.backward_boxes(grad, inputs).numpy() - gradient).max() / np.abs(gradient).max(),
    )


def loads_of_2018(boxes: Tensor) -> int:
    """Features read per channel by the kernel of 2018: four for every unit cell that a bin touches."""
    total = 0
    for box in (boxes.double().numpy() / STRIDE - 0.5).tolist():
        cells = [0, 0]
        for axis in (0, 1):
            width = (box[axis + 2] - box[axis]) / BINS
            edges = [box[axis] + width * i for i in range(BINS + 1)]
            cells[axis] = sum(math.ceil(b) - math.floor(a) for a, b in pairwise(edges))
        total += 4 * cells[0] * cells[1]
    return total
