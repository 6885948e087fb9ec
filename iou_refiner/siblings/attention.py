"""Attention over a bounded number of neighbours, each described by how it lies to the box that listens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_NOBODY = -1e4  # logit of a neighbour that is not there; finite, so that a box without any stays finite


class NeighbourAttention(nn.Module):
    """Each of Q boxes takes in what K neighbours say, weighed by what they are and by how they lie to it.

    A slot of logit 0 and value 0 stands beside the neighbours, so that a box may listen to nobody.

    Args:
        width: numbers of a box; in and out.
        heads: of the attention.
        pair_width: numbers of a pair.
    """

    def __init__(self, width: int, heads: int, pair_width: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.pair_logits, self.pair_value = nn.Linear(pair_width, heads), nn.Linear(pair_width, width)
        self.output = nn.Linear(width, width)

    def forward(self, boxes: Tensor, others: Tensor, pairs: Tensor, index: Tensor, present: Tensor) -> Tensor:
        """What each box is after listening, (Q, width).

        Args:
            boxes: (Q, width).
            others: (N, width), among which the neighbours are.
            pairs: (Q, K, pair_width), of each box with each neighbour.
            index: (Q, K) int64, rows of ``others``.
            present: (Q, K) bool, which neighbours there are.
        """
        count, neighbours = index.shape
        shape = (count, neighbours, self.heads, boxes.shape[1] // self.heads)
        query = self.query(self.norm(boxes)).view(count, 1, *shape[2:])
        key = self.key(others).index_select(0, index.flatten()).view(shape)
        value = self.value(others).index_select(0, index.flatten()).view(shape) + self.pair_value(pairs).view(shape)
        logits = (query * key).sum(3) / math.sqrt(key.shape[3]) + self.pair_logits(pairs)
        weight = softmax_with_silence(logits, present)
        heard: Tensor = self.output((weight[..., None] * value).sum(1).flatten(1))
        return boxes + heard


def softmax_with_silence(logits: Tensor, present: Tensor) -> Tensor:
    """Softmax over the neighbours and a slot of logit 0, which is left out of the result: (Q, K, H) to (Q, K, H).

    Args:
        logits: (Q, K, H).
        present: (Q, K) bool; the others get weight 0.
    """
    logits = logits.masked_fill(~present[..., None], _NOBODY)
    silence = logits.new_zeros(len(logits), 1, logits.shape[2])
    return torch.cat([logits, silence], 1).softmax(1)[:, :-1]
