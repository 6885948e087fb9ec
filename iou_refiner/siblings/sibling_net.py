"""The network over siblings: from how the boxes around a box lie and score, how good it is and where a better one lies.

It needs no image. A survivor of suppression starts from its own class score, size, place at the image border and how
crowded it is; in each round it listens to its siblings (all overlapping candidates) and its rivals (overlapping
survivors). Where a head reads the detector's features, what its trunk made of the box (the RoI embedding) joins in.

Three outputs. The *IoU* with the object. The *deltas* to a better box: a vote of the siblings, with a weight for each
side of each of them, plus what the network adds. The *share*: at which of the ten IoU thresholds of COCO this detection
is a true positive, once boxes of lower score on the same object count as duplicates; its mean is the detection score.
AP is the mean over these thresholds of how well true positives stand before the others, so the expected share is what
detections should be ordered by; a product of powers of class score and IoU is a guess at it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from iou_refiner.boxes import DELTA_STDS, MAX_LOG_SCALE
from iou_refiner.siblings.attention import NeighbourAttention, softmax_with_silence
from iou_refiner.siblings.clusters import CROWDING, Clusters
from iou_refiner.siblings.config import SiblingConfig

#: The IoU thresholds of the share: those of COCO's AP.
THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))
_SMALLEST_SCORE = 1e-4  # of scores 0 and 1 the logit is not finite
_AT_BORDER = 1.0  # pixels from the border within which a box touches it
_BOX, _PAIR = 7, 11  # numbers that describe a box, and a pair


class Verdict(NamedTuple):
    """What the siblings say of Q survivors.

    Attributes:
        iou_logits: (Q,) float32; their sigmoid is the IoU with the object of the box moved by ``deltas``.
        deltas: (Q, 4) float32, to a better box, see :func:`~iou_refiner.boxes.encode_boxes`.
        share_logits: (Q, 10) float32; their sigmoid is the probability to be a true positive at each threshold.
    """

    iou_logits: Tensor
    deltas: Tensor
    share_logits: Tensor

    @property
    def iou(self) -> Tensor:
        """(Q,) in [0, 1]."""
        return self.iou_logits.sigmoid()

    @property
    def scores(self) -> Tensor:
        """(Q,) in [0, 1]: the detection score, the expected share of thresholds with a true positive."""
        return self.share_logits.sigmoid().mean(1)


class SiblingNet(nn.Module):
    """Judges the survivors of a suppression by the candidates around them.

    Args:
        config: the architecture; default :class:`SiblingConfig`.
        embedding: size of the RoI embedding of each survivor; 0 for a network without features.

    Laws: the verdict on a survivor depends on no candidate of another image or class, and not on the order of the
    candidates; it is the same for boxes and limits multiplied by a number, up to what touches the border.
    """

    def __init__(self, config: SiblingConfig | None = None, *, embedding: int = 0):
        super().__init__()
        self.config = config or SiblingConfig()
        width, pair_width, rounds = self.config.width, self.config.pair_width, self.config.layers
        self.box = nn.Sequential(nn.Linear(_BOX, width), nn.GELU(), nn.Linear(width, width))
        self.candidate = nn.LayerNorm(width)
        self.crowding = nn.Linear(CROWDING, width)
        self.embedding = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, width)) if embedding else None
        self.sibling_pair, self.rival_pair = (
            nn.Sequential(nn.Linear(_PAIR, pair_width), nn.GELU(), nn.Linear(pair_width, pair_width), nn.GELU())
            for _ in range(2)
        )
        self.rounds = nn.ModuleList(_Round(self.config) for _ in range(rounds))
        self.norm = nn.LayerNorm(width)
        self.vote = nn.Linear(pair_width + width, 4)
        self.output = nn.Linear(width, 1 + 4 + len(THRESHOLDS))
        self.score_weight = nn.Parameter(torch.ones(len(THRESHOLDS)))
        for layer in (self.vote, self.output):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output.weight.device

    def forward(
        self, boxes: Tensor, scores: Tensor, limits: Tensor, clusters: Clusters, embedding: Tensor | None = None
    ) -> Verdict:
        """The verdict on each survivor.

        Args:
            boxes: (N, 4) float32 xyxy candidates, finite, with width and height.
            scores: (N,) float class scores in [0, 1].
            limits: (N, 4) float32, width and height of the image of each, twice.
            clusters: who is whose sibling, see :meth:`Clusters.of`.
            embedding: (Q, E) RoI embedding of each survivor; None judges without features.
        """
        score = torch.logit(scores.float().clamp(_SMALLEST_SCORE, 1 - _SMALLEST_SCORE))
        described: Tensor = self.box(_describe(boxes, score, limits))
        rows = clusters.survivors
        survivor = described[rows] + self.crowding(clusters.crowding)
        if embedding is not None and self.embedding is not None:
            seen = self.embedding(embedding.float())
            # Where the detector's features are not finite, a box is judged without them.
            survivor = survivor + torch.where(torch.isfinite(seen).all(1, keepdim=True), seen, 0.0)
        candidates = self.candidate(described)
        pairs, sides = _describe_pairs(boxes, score, rows, clusters.siblings)
        siblings = self.sibling_pair(pairs)
        rivals = self.rival_pair(_describe_pairs(boxes, score, rows, rows[clusters.rivals])[0])
        for listen in self.rounds:
            survivor = listen(survivor, candidates, siblings, rivals, clusters)
        survivor = self.norm(survivor)
        output = self.output(survivor).float()
        beside = survivor[:, None].expand(-1, siblings.shape[1], -1)
        weight = softmax_with_silence(self.vote(torch.cat([siblings, beside], 2)), clusters.is_sibling)
        deltas = output[:, 1:5] * output.new_tensor(DELTA_STDS) + _as_deltas((weight * sides).sum(1))
        return Verdict(output[:, 0], deltas, output[:, 5:] + self.score_weight * score[rows, None])


class _Round(nn.Module):
    """Listen to siblings, then to rivals, then think."""

    def __init__(self, config: SiblingConfig):
        super().__init__()
        width, heads, pair_width = config.width, config.attention_heads, config.pair_width
        self.to_siblings = NeighbourAttention(width, heads, pair_width)
        self.to_rivals = NeighbourAttention(width, heads, pair_width)
        self.rival = nn.LayerNorm(width)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, survivor: Tensor, candidates: Tensor, siblings: Tensor, rivals: Tensor, clusters: Clusters
    ) -> Tensor:
        survivor = self.to_siblings(survivor, candidates, siblings, clusters.siblings, clusters.is_sibling)
        survivor = self.to_rivals(survivor, self.rival(survivor), rivals, clusters.rivals, clusters.is_rival)
        thought: Tensor = self.think(survivor)
        return survivor + thought


def _size(boxes: Tensor) -> Tensor:
    """Width and height (..., 2) of boxes (..., 4), never 0."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)


def _describe(boxes: Tensor, score: Tensor, limits: Tensor) -> Tensor:
    """(N, _BOX): class score, size in the image, and which borders each box touches."""
    border = torch.cat([boxes[:, :2] <= _AT_BORDER, boxes[:, 2:] >= limits[:, 2:] - _AT_BORDER], 1)
    relative = (_size(boxes) / limits[:, 2:].clamp(min=1e-3)).log()
    return torch.cat([score[:, None] / 2, relative, border.to(relative)], 1)


def _describe_pairs(boxes: Tensor, score: Tensor, rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """How others (Q, K) lie to the boxes of these rows (Q,): (Q, K, _PAIR), and how far each of their four sides is
    from the box's, in units of its width and height, (Q, K, 4)."""
    box, other = boxes[rows, None], boxes.index_select(0, others.flatten()).view(*others.shape, 4)
    size, other_size = _size(box), _size(other)
    sides = (other - box) / size.repeat(1, 1, 2)
    overlap = (torch.minimum(other[..., 2:], box[..., 2:]) - torch.maximum(other[..., :2], box[..., :2])).clamp(min=0)
    shared, area, other_area = overlap.prod(2), size.prod(2), other_size.prod(2)
    ahead = score.index_select(0, others.flatten()).view(others.shape) - score[rows, None]
    iou = shared / (area + other_area - shared)
    parts = [iou * 2 - 1, ahead / 2, (ahead > 0).to(ahead), shared / area, shared / other_area]
    described = torch.cat([3 * sides, (other_size / size).log(), torch.stack(parts, 2)], 2)
    # Where an area is beyond float32, nothing can be said of the pair. Such boxes are no siblings, and weigh nothing.
    return described.clamp(-5, 5).nan_to_num(), sides.nan_to_num()


def _as_deltas(sides: Tensor) -> Tensor:
    """Moves of the four sides (Q, 4), in units of width and height, as deltas."""
    growth = (1 + sides[:, 2:] - sides[:, :2]).clamp(min=0.2).log().clamp(max=MAX_LOG_SCALE)
    return torch.cat([(sides[:, :2] + sides[:, 2:]) / 2, growth], 1)
