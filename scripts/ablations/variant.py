"""One variant of a training ablation: a way to make a head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from iou_refiner.head.config import HeadConfig
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.settings import StageSettings
from iou_refiner.training.loop import Loss, SampleBoxes
from iou_refiner.training.losses import total_loss
from iou_refiner.training.samples import sample_boxes
from iou_refiner.training.settings import TrainSettings

_LR = 5e-4  # of all variants that name no other, whatever the default becomes


@dataclass(frozen=True)
class Variant:
    """What differs from the default.

    Args:
        head: changes to :class:`HeadConfig`.
        train: changes to :class:`TrainSettings`, of which ``views`` and ``epochs`` follow from what is below.
        stage: changes to the settings of the stage that the head is measured with.
        views: the views of every image to train on, by number.
        share: share of the training images to train on.
        make_head: called as :class:`IoUHead` is.
        make_sampler: from the head to what samples its training boxes.
        loss: what the head learns.

    Raises:
        TypeError: a change names no setting.
        ValueError: a setting is out of range.
    """

    head: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    stage: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[int, ...] = (0, 1, 2, 3)
    share: float = 1.0
    make_head: Callable[..., IoUHead] = IoUHead
    make_sampler: Callable[[IoUHead], SampleBoxes] = lambda head: sample_boxes
    loss: Loss = total_loss

    def __post_init__(self) -> None:
        for settings, changes in ((HeadConfig, self.head), (TrainSettings, self.train), (StageSettings, self.stage)):
            settings(**changes)

    @property
    def config(self) -> HeadConfig:
        """The architecture of the head."""
        return HeadConfig(**self.head)

    def train_settings(self, *, epochs: int) -> TrainSettings:
        """How the head is trained."""
        return TrainSettings(**{"lr": _LR, **self.train}, views=len(self.views), epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        """What a row says of it."""
        return {name: getattr(self, name) for name in ("head", "train", "stage", "views", "share")}
