"""The wrapper that puts the stage into a live detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.registry import as_adapter
from iou_refiner.head.checkpoint import load_head
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage


class IoURefiner(nn.Module):
    """A frozen detector with the stage in place of its suppression: same call, same output, plus ``ious``.

    Args:
        detector: a live detector of a framework an adapter is installed for, or an :class:`Adapter`.
        head: a trained :class:`IoUHead`, or the path of one. Without a head the detector runs alone, untouched.
        settings: of the :class:`Stage`; default: what the head recommends.
        changes: settings to exchange in these, by name.

    Raises:
        TypeError: no adapter knows the detector.
        ValueError: the head was trained on another detector, or a setting is unknown or out of range.

    A detector in training mode is called as it is: there are no detections to refine.
    """

    def __init__(
        self,
        detector: Any,
        head: IoUHead | str | Path | None = None,
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
        self.head = head if isinstance(head, IoUHead) else load_head(head)
        check_head(self.head, self.adapter)
        self.head.to(self.adapter.device).eval()
        self.stage = Stage(self.head, settings, **changes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the detector's own call; boxes, scores and labels are the stage's."""
        if self.stage is None or self.adapter.training:
            return self.adapter.detect(*args, **kwargs)
        return self.adapter.run(self.stage, *args, **kwargs)

    def native(self) -> Any:
        """The detector with the stage in it, as an object of the framework's own class, for code that asks for one
        (``inference_detector`` of mmdet). It shares all weights with the detector, which stays as it is."""
        return self.detector if self.stage is None else self.adapter.twin(self.stage)


def check_head(head: IoUHead, adapter: Adapter) -> None:
    """Raise ValueError if the head says that it was trained on the features of another detector."""
    trained_on, here = head.metadata, adapter.fingerprint()
    if trained_on.fingerprint and trained_on.fingerprint != here:
        raise ValueError(
            f"The head was trained on the detector {trained_on.detector_name or 'without a name'} "
            f"{trained_on.fingerprint[:12]}, this one is {adapter.name} {here[:12]}: its predictions would mean "
            "nothing here. Use the detector it was trained on, or train a head for this one."
        )
