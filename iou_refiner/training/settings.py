"""The settings of training, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from iou_refiner.checks import check_fraction, check_number, check_positive

# The lowest IoU that boxes can be jittered to: at the end of its ray every box, whatever the direction, is below it.
LOWEST_IOU = 0.02

# Beyond these nothing is gained, and a typo would fill the disk or run for weeks.
_MOST: dict[str, float] = {
    "views": 64, "epochs": 10_000, "batch_size": 1024, "boxes_per_image": 10_000, "lr": 10, "weight_decay": 10,
}  # fmt: skip


# Views of all images together that are enough to learn from, and the most of one image that "auto" takes.
_ENOUGH_VIEWS, _MOST_VIEWS = 10_000, 8


@dataclass(frozen=True)
class TrainSettings:
    """How a head is trained. The optimizer is AdamW, with a linear warm-up and a cosine to zero.

    Args:
        views: views of every image to train on: itself, its mirror image, then random windows. Few images want many;
            "auto" takes as many as make 10,000 in all, from 1 to 8.
        epochs: passes over all views of all images.
        batch_size: images a step.
        boxes_per_image: boxes sampled from each image.
        candidate_share: share of them that are the detector's own candidates; the rest is jittered ground truth.
        jitter_min_iou: lowest IoU of the jittered boxes.
        lr: peak learning rate.
        weight_decay: of AdamW.

    Raises:
        ValueError: a setting is out of range.
    """

    views: int | Literal["auto"] = 4
    epochs: int = 2
    batch_size: int = 8
    boxes_per_image: int = 96
    candidate_share: float = 0.5
    jitter_min_iou: float = 0.2
    lr: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check_fraction("candidate_share", self.candidate_share)
        if not LOWEST_IOU <= self.jitter_min_iou <= 1:
            raise ValueError(f"`jitter_min_iou` must lie in [{LOWEST_IOU}, 1], got {self.jitter_min_iou!r}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"`weight_decay` must be 0 or more, got {self.weight_decay!r}.")
        check_within(self, _MOST, auto="views")

    def views_of(self, images: int) -> int:
        """How many views there are of each of so many images."""
        if self.views != "auto":
            return self.views
        return max(1, min(_MOST_VIEWS, round(_ENOUGH_VIEWS / max(images, 1))))

    def of(self, images: int) -> TrainSettings:
        """These settings with the number of views that they mean for so many images."""
        return replace(self, views=self.views_of(images))


def check_within(settings: object, most: dict[str, float], *, auto: str) -> None:
    """Raise ValueError unless the numbers of a training are above 0, whole but for rates, and no larger than ``most``.

    The one called ``auto`` may be "auto" instead, and the weight decay may be 0.
    """
    numbers = {name: getattr(settings, name) for name in most if (name, getattr(settings, name)) != (auto, "auto")}
    if isinstance(numbers.get(auto), str):
        raise ValueError(f'`{auto}` must be a number or "auto", got {numbers[auto]!r}.')
    for name, value in numbers.items():
        if name != "weight_decay":
            check_positive(name, value)
    for name, value in numbers.items():
        check_number(name, value, 0, most[name], whole=name not in ("lr", "weight_decay"))
