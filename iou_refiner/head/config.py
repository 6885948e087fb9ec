"""What describes a head beside its weights, as plain data. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from iou_refiner.checks import check_choice, check_number, check_positive

# Beyond these nothing is gained, and a typo (or a hostile file) would fill the memory.
MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS, MOST_BINS, MOST_CONTEXT = 16_384, 16, 16, 64, 16


@dataclass(frozen=True)
class HeadConfig:
    """The architecture of an :class:`~iou_refiner.head.iou_head.IoUHead`.

    Args:
        width: channels after the 1x1 convolution that narrows each feature map; 0 pools the maps as they are, which
            then need equal channels.
        mix: channels of each pooled bin after its levels and channels are mixed; 0 mixes nothing.
        hidden: sizes of the fully connected layers.
        output_size: bins per side of the pooling.
        context: side of the pooled region over that of the box, about the same centre. Above 1 the head also sees what
            lies just outside each edge, which is where it shows that a box is too small.
        levels: feature levels each box is pooled from, the one FPN assigns and the next coarser ones. 1 is the
            paper's; as many as there are, or more, pools every box from all.
        aligned: cell ``i`` of a map is centred at ``(i + 0.5) * stride``; False is the original PrRoIPool.
        ranking: also learn the order of the boxes around one object.
        deltas: also learn box regression.
        objective: what the head learns: the IoU as a probability ("bce"), or the paper's smooth-L1 on 2 IoU - 1.

    Raises:
        ValueError: a value is out of range.
    """

    width: int = 48
    mix: int = 32
    hidden: tuple[int, ...] = (320, 256)
    output_size: int = 7
    context: float = 1.5
    levels: int = 3
    aligned: bool = True
    ranking: bool = True
    deltas: bool = True
    objective: Literal["bce", "smooth_l1"] = "bce"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name in ("width", "mix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)!r}.")
            check_number(name, getattr(self, name), 0, MOST_CHANNELS, whole=True)
        for size in self.hidden:
            check_positive("hidden", size)
            check_number("hidden", size, 1, MOST_CHANNELS, whole=True)
        if len(self.hidden) > MOST_LAYERS:
            raise ValueError(f"`hidden` must have at most {MOST_LAYERS} layers, got {len(self.hidden):,}.")
        for name, most in (("levels", MOST_LEVELS), ("output_size", MOST_BINS)):
            check_positive(name, getattr(self, name))
            check_number(name, getattr(self, name), 1, most, whole=True)
        check_choice("objective", self.objective, ["bce", "smooth_l1"])
        check_positive("context", self.context)
        check_number("context", self.context, 0, MOST_CONTEXT)


@dataclass(frozen=True)
class TrainedCategory:
    """A category that a head was trained on: id and name in the data set, and the detector's class number."""

    id: int
    name: str
    label: int


@dataclass(frozen=True)
class HeadMetadata:
    """Where a head comes from, and what to do with it.

    Args:
        detector_name: of the detector whose features it was trained on; for messages.
        fingerprint: of that detector, checked when the head is put to use; empty for any detector.
        recommended: the :class:`~iou_refiner.stage.settings.StageSettings` that measured best on val, by name; empty
            for the defaults.
        training: the settings it was trained with.
        metrics: what the last epoch measured.
        trials: each of the settings tried on val, with its AP and AP50.
        categories: what it was trained on: of each category with annotated objects its ``id`` and ``name`` in the data
            set, and ``label``, the detector's class number. Candidates of other labels keep the detector's own
            suppression, box and score; empty stands for a head that takes all.
        candidates: of a head without features: what the candidates were like that it was trained on, see
            :mod:`iou_refiner.siblings.likeness`; what differs from them is refused.
    """

    detector_name: str = ""
    fingerprint: str = ""
    recommended: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    trials: tuple[Mapping[str, Any], ...] = ()
    categories: tuple[TrainedCategory, ...] = ()
    candidates: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
