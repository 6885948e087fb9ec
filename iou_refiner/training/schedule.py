"""The learning rate of a training: a linear warm-up, then a cosine to zero."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_WARM_UP = 0.05  # share of all steps


def warm_up_then_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """The schedule of an optimizer over ``steps`` steps; its learning rate is the peak."""
    warm_up = max(1, round(steps * _WARM_UP))

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return LambdaLR(optimizer, factor)
