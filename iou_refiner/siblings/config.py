"""The architecture of the network over siblings, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from iou_refiner.checks import check_fraction, check_number

# Beyond these nothing is gained, and a typo (or a hostile file) would fill the memory.
_MOST = {
    "width": 1024, "layers": 16, "attention_heads": 64, "pair_width": 1024, "siblings": 1024, "rivals": 1024,
    "most_survivors": 10_000,
}  # fmt: skip


@dataclass(frozen=True)
class SiblingConfig:
    """The architecture of a :class:`~iou_refiner.siblings.sibling_net.SiblingNet`, and which boxes it judges.

    Args:
        nms_threshold: IoU of the greedy NMS by class score whose survivors are judged.
        most_survivors: survivors judged in an image, best scores first; the others are dropped.
        siblings: candidates that each survivor listens to, those with most score and overlap first.
        rivals: other survivors that it listens to, those with most overlap first.
        width: numbers that describe a box inside of the network.
        pair_width: numbers that describe a pair of boxes.
        layers: rounds of attention.
        attention_heads: of each round; they divide ``width``.

    Raises:
        ValueError: a value is out of range.
    """

    nms_threshold: float = 0.7
    most_survivors: int = 150
    siblings: int = 32
    rivals: int = 12
    width: int = 64
    pair_width: int = 32
    layers: int = 2
    attention_heads: int = 4

    def __post_init__(self) -> None:
        check_fraction("nms_threshold", self.nms_threshold)
        for name, most in _MOST.items():
            check_number(name, getattr(self, name), 1, most, whole=True)
        if self.width % self.attention_heads:
            raise ValueError(f"`attention_heads` must divide `width`, got {self.attention_heads} and {self.width}.")
