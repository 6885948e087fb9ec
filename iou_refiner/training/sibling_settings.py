"""The settings of training a network over siblings, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iou_refiner.checks import check_fraction
from iou_refiner.training.settings import check_within

# Images, counted in each pass, that are enough to learn from.
_ENOUGH = 16_000

_MOST: dict[str, float] = {"epochs": 10_000, "batch_size": 1024, "lr": 10, "weight_decay": 10}


@dataclass(frozen=True)
class SiblingSettings:
    """How a network over siblings is trained. The optimizer is AdamW, with a linear warm-up and a cosine to zero.

    Args:
        epochs: passes over all images; "auto" takes as many as make 16,000 images in all, from 3 to 10.
        batch_size: images a step.
        sibling_dropout: share of the siblings that a box does not hear, others each time.
        embedding_dropout: share of the batches that are judged without the RoI embedding.
        lr: peak learning rate.
        weight_decay: of AdamW.

    Raises:
        ValueError: a setting is out of range.
    """

    epochs: int | Literal["auto"] = "auto"
    batch_size: int = 8
    sibling_dropout: float = 0.15
    embedding_dropout: float = 0.25
    lr: float = 2e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("sibling_dropout", "embedding_dropout"):
            check_fraction(name, getattr(self, name))
        check_within(self, _MOST, auto="epochs")

    def epochs_of(self, images: int) -> int:
        """Passes over so many images."""
        return min(max(round(_ENOUGH / max(images, 1)), 3), 10) if self.epochs == "auto" else self.epochs
