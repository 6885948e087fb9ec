"""The trunk of the head: from the pooled features of a box to its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Trunk(nn.Module):
    """Mix the levels and channels of each bin, then combine all bins.

    Without the mixing, fully connected layers see every channel of every level in every bin, and the first of them
    costs more than all the rest of the head. Mixed to a few channels first, the same boxes take two thirds of the time;
    what that costs in accuracy is in docs/accuracy.md, ablation 4.

    Args:
        levels, bins, channels: of the pooled features.
        mix: channels of each bin after mixing; 0 mixes nothing, as in the paper.
        hidden: sizes of the fully connected layers.

    Attributes:
        out_features: numbers for each box.
    """

    def __init__(self, levels: int, bins: int, channels: int, *, mix: int, hidden: Sequence[int]):
        super().__init__()
        self.mix = nn.Linear(levels * channels, mix) if mix else None
        sizes = [bins * (mix or levels * channels), *hidden]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.out_features = sizes[-1]

    def forward(self, pooled: Tensor) -> Tensor:
        """From (levels, R, bins, channels) to (R, out_features)."""
        levels, boxes, bins, channels = pooled.shape
        if self.mix is None:
            flat = pooled.transpose(0, 1).reshape(boxes, levels * bins * channels)
        else:
            # One product per level adds up to the mixing of them all side by side, without laying them side by side.
            mixed: Tensor = self.mix.bias
            for rows, weight in zip(pooled.flatten(1, 2), self.mix.weight.chunk(levels, 1), strict=True):
                mixed = torch.addmm(mixed, rows, weight.t())
            flat = mixed.relu_().view(boxes, bins * self.mix.out_features)
        embedding: Tensor = self.layers(flat)
        return embedding
