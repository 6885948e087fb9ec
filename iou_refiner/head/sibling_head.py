"""A head without features: it has nothing but the boxes and scores of a box's siblings, and needs no detector."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from iou_refiner.head.config import HeadMetadata
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.sibling_net import SiblingNet


class SiblingHead(nn.Module):
    """Rescores and moves detections by their siblings alone.

    Args:
        config: the architecture; default :class:`SiblingConfig`.
        metadata: where it comes from.

    Attributes:
        siblings: the network.
    """

    num_classes = 0

    def __init__(self, config: SiblingConfig | None = None, *, metadata: HeadMetadata | None = None):
        super().__init__()
        self.metadata = metadata or HeadMetadata()
        self.siblings = SiblingNet(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.siblings.device

    @property
    def architecture(self) -> dict[str, Any]:
        """What the network is built from, as plain data."""
        return {"siblings": asdict(self.siblings.config)}
