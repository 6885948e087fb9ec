"""Who is whose sibling: the survivors of a suppression, and for each a bounded number of boxes around it.

Before suppression a detector says five to fifty boxes about one object. Those of one class that overlap are siblings.
How they agree, where they scatter and which scores they carry says how well the best of them fits, and where a better
box lies. A survivor listens to two kinds: *siblings*, all candidates that overlap it, and *rivals*, the other survivors
that do: two of them on one object are one too many, on two objects that stand close they are not.

Memory is that of survivors times candidates of one image at a time, and grows with the number of images by a few
hundred bytes for each survivor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from iou_refiner.boxes import pairwise_iou
from iou_refiner.siblings.config import SiblingConfig

# IoU from which on a candidate is a sibling, and another survivor a rival.
_SIBLING_IOU, _RIVAL_IOU = 0.15, 0.02
# How crowded it is around a survivor: candidates, and other survivors, above these IoU.
_CROWD_OF_CANDIDATES, _CROWD_OF_SURVIVORS = (0.5, 0.7, 0.9), (0.3, 0.5)
#: Numbers that :attr:`Clusters.crowding` holds for each survivor.
CROWDING = len(_CROWD_OF_CANDIDATES) + len(_CROWD_OF_SURVIVORS)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Q survivors among N candidates, with at most K siblings and L rivals each.

    Attributes:
        survivors: (Q,) int64, rows of the candidates.
        siblings: (Q, K) int64, rows of the candidates; any row where ``is_sibling`` is False.
        is_sibling: (Q, K) bool.
        rivals: (Q, L) int64, rows of ``survivors``; any row where ``is_rival`` is False.
        is_rival: (Q, L) bool.
        crowding: (Q, CROWDING) float32, how many boxes overlap a survivor by how much.
    """

    survivors: Tensor
    siblings: Tensor
    is_sibling: Tensor
    rivals: Tensor
    is_rival: Tensor
    crowding: Tensor

    def __len__(self) -> int:
        """Number of survivors."""
        return len(self.survivors)

    @property
    def crowd_above_70(self) -> Tensor:
        """(Q,) how many candidates overlap a survivor by more than IoU .7."""
        return self.crowding[:, _CROWD_OF_CANDIDATES.index(0.7)].expm1()

    def to(self, device: torch.device) -> Clusters:
        """The same on another device."""
        return Clusters(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @classmethod
    def of(cls, boxes: Tensor, scores: Tensor, labels: Tensor, survivors: Tensor, config: SiblingConfig) -> Clusters:
        """The clusters of one image.

        Args:
            boxes: (N, 4) float xyxy, finite.
            scores: (N,) float class scores in [0, 1].
            labels: (N,) integer; boxes of different labels are never siblings.
            survivors: (Q,) int64 rows of what a suppression kept.
            config: for the bounds.
        """
        overlap = pairwise_iou(boxes[survivors], boxes) * (labels[survivors, None] == labels)
        overlap = overlap.scatter(1, survivors[:, None], 0.0)  # nobody is its own sibling
        among = overlap[:, survivors]
        evidence = torch.where(overlap > _SIBLING_IOU, overlap * scores, 0.0)
        siblings, is_sibling = _largest(evidence, config.siblings)
        rivals, is_rival = _largest(torch.where(among > _RIVAL_IOU, among, 0.0), config.rivals)
        crowding = [(overlap > iou).sum(1).add(1).log() for iou in _CROWD_OF_CANDIDATES]
        crowding += [(among > iou).sum(1) for iou in _CROWD_OF_SURVIVORS]
        return cls(survivors, siblings, is_sibling, rivals, is_rival, torch.stack(crowding, 1).to(boxes.dtype))

    @classmethod
    def concat(cls, parts: Sequence[Clusters], candidates: Sequence[int]) -> Clusters:
        """The clusters of several images in one.

        Args:
            parts: of each image; at least one.
            candidates: number of candidates of each image, which lie one image after the other.
        """
        columns: dict[str, list[Tensor]] = {field.name: [] for field in fields(cls)}
        first, first_survivor = 0, 0
        for part, count in zip(parts, candidates, strict=True):
            columns["survivors"].append(part.survivors + first)
            columns["siblings"].append(part.siblings + first)
            columns["rivals"].append(part.rivals + first_survivor)
            for name in ("is_sibling", "is_rival", "crowding"):
                columns[name].append(getattr(part, name))
            first, first_survivor = first + count, first_survivor + len(part)
        return cls(**{name: torch.cat(column) for name, column in columns.items()})


def reach(boxes: Tensor) -> Tensor:
    """How far the candidates (N, 4) of an image reach, (4,), width and height twice: its size where nobody says it."""
    sides = boxes[torch.isfinite(boxes).all(1), 2:]
    return (sides.amax(0) if len(sides) else boxes.new_ones(2)).repeat(2)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns (Q, count) of the largest positive values of each row, largest first, and whether there is one."""
    top = values.topk(min(count, values.shape[1]), 1)
    empty = count - top.indices.shape[1]
    return (
        torch.nn.functional.pad(top.indices, (0, empty)),
        torch.nn.functional.pad(top.values > 0, (0, empty)),
    )
