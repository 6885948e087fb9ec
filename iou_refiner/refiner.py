"""The wrapper that puts the stage into a live detector."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner.checks import DataError
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.registry import as_adapter
from iou_refiner.head.checkpoint import Head, load_head
from iou_refiner.head.config import TrainedCategory
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps


class IoURefiner(nn.Module):
    """A frozen detector with the stage in place of its suppression: same call, same output, plus ``ious``.

    Args:
        detector: a live detector of a framework an adapter is installed for, or an :class:`Adapter`.
        head: a trained :class:`IoUHead` or :class:`SiblingHead`, or the path of one. Without a head the detector runs
            alone, untouched.
        settings: of the :class:`Stage`; default: what the head recommends.
        changes: settings to exchange in these, by name.

    Raises:
        TypeError: no adapter knows the detector.
        ValueError: a setting is unknown or out of range.
        DataError: the head was trained on another detector.

    Warns:
        UserWarning: once, when the detector has candidates of categories that the head was not trained on. They keep
            the detector's own suppression, box and score; ``all_categories=True`` applies the head to them too.

    A detector in training mode is called as it is: there are no detections to refine.
    """

    def __init__(
        self,
        detector: Any,
        head: Head | str | Path | None = None,
        settings: StageSettings | None = None,
        **changes: Any,
    ):
        super().__init__()
        self.adapter = as_adapter(detector)
        self.detector = self.adapter.detector
        self.stage: Stage | None = None
        if head is None:
            if settings or changes:
                names = ", ".join(changes) or "settings"
                raise ValueError(f"Settings of the stage ({names}) need a `head`.")
            return
        self.head = load_head(head) if isinstance(head, (str, Path)) else head
        check_head(self.head, self.adapter)
        self.head.to(self.adapter.device).eval()
        self.stage = Stage(self.head, settings, own_threshold=self.adapter.nms_threshold, **changes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the detector's own call; boxes, scores and labels are the stage's. No images give no results."""
        if not kwargs and len(args) == 1 and isinstance(args[0], (list, tuple)) and not args[0]:
            return []
        if self.stage is None or self.adapter.training:
            return self.adapter.detect(*args, **kwargs)
        return self.adapter.run(self._suppress, *args, **kwargs)

    def _suppress(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """The stage, with a word on the first boxes that are beyond the head's training."""
        assert self.stage is not None
        before = self.stage.summary.untrained
        detections = self.stage(features, candidates)
        if self.stage.summary.untrained > before == 0:
            trained = self.head.metadata.categories
            warnings.warn(
                f"The detector has boxes of categories that the head was not trained on (it was on {names(trained)}): "
                "these keep the detector's own suppression, box and score. To apply the head to them too: "
                "all_categories=True.",
                stacklevel=2,
            )
        return detections

    def native(self) -> Any:
        """The detector with the stage in it, as an object of the framework's own class, for code that asks for one
        (``inference_detector`` of mmdet). It shares all weights with the detector, which stays as it is."""
        return self.detector if self.stage is None else self.adapter.twin(self._suppress)


def check_head(head: Head, adapter: Adapter) -> None:
    """Raise DataError if the head says that it was trained on the features of another detector."""
    trained_on, here = head.metadata, adapter.fingerprint()
    if trained_on.fingerprint and trained_on.fingerprint != here:
        raise DataError(
            f"The head was trained on the detector {trained_on.detector_name or 'without a name'} "
            f"{trained_on.fingerprint[:12]}, this one is {adapter.name} {here[:12]}: its predictions would mean "
            "nothing here. Use the detector it was trained on, or train a head for this one."
        )


def names(categories: Sequence[TrainedCategory]) -> str:
    """The names of a few categories, for a message."""
    shown = ", ".join(category.name for category in categories[:5])
    return shown + (f", ... {len(categories)} in all" if len(categories) > 5 else "") if categories else "others"
