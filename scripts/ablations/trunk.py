"""Ablation 4: what stands between the pooled features and the outputs. AP per millisecond.

The default mixes levels and channels within each bin (a 1x1 convolution, in the terms of a feature map) before its
fully connected layers. Against it: other sizes, no mixing, and a few spatial patterns per channel (a depthwise
convolution as large as the pooled map), as lightweight detectors do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from iou_refiner.head.config import HeadConfig
from iou_refiner.head.iou_head import IoUHead
from scripts.ablations.harness import run_training_ablation
from scripts.ablations.variant import Variant


class _Bins(nn.Module):
    """Rows (R, levels * bins * C) as (R, bins, levels * C)."""

    def __init__(self, levels: int, bins: int):
        super().__init__()
        self.levels, self.bins = levels, bins

    def forward(self, pooled: Tensor) -> Tensor:
        grid = pooled.view(len(pooled), self.levels, self.bins, pooled.shape[1] // (self.levels * self.bins))
        return grid.transpose(1, 2).reshape(len(pooled), self.bins, -1)


class _Depthwise(nn.Module):
    """(R, bins, C) to (R, C * patterns): how much of each of its own patterns over the bins a channel shows."""

    def __init__(self, bins: int, channels: int, patterns: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, patterns, bins) / bins**0.5)

    def forward(self, bins: Tensor) -> Tensor:
        return (bins.permute(2, 0, 1) @ self.weight.transpose(1, 2)).permute(1, 0, 2).reshape(len(bins), -1)


def depthwise(
    channels: Sequence[int], strides: Sequence[float], config: HeadConfig, *, patterns: int = 8, **rest: Any
) -> IoUHead:
    """A head that looks for a few patterns over the bins of each channel, then mixes channels."""
    head = IoUHead(channels, strides, replace(config, mix=0), **rest)
    bins, width = config.output_size**2, config.width * head.num_levels
    layers = nn.Sequential(nn.Linear(width * patterns, config.hidden[0]), *list(head.trunk.layers)[1:])
    head.trunk.layers = nn.Sequential(_Bins(head.num_levels, bins), _Depthwise(bins, width, patterns), *layers)
    return head


VARIANTS = {
    "default: width 48, bins mixed to 32, FC 320, 256": Variant(),
    "width 24, bins mixed to 24, FC 256": Variant(head={"width": 24, "mix": 24, "hidden": (256,)}),
    "not mixed, FC 320, 256": Variant(head={"mix": 0}),
    "not mixed, FC 1024, 1024": Variant(head={"mix": 0, "hidden": (1024, 1024)}),
    "not mixed, 8 patterns a channel, FC 320, 256": Variant(make_head=depthwise),
}

if __name__ == "__main__":
    run_training_ablation("trunk", VARIANTS, __doc__)
