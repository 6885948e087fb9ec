"""The wrapper that puts the stage into a live detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner.detectors import as_adapter
from iou_refiner.extraction import Adapter
from iou_refiner.predictor import IoUPredictor
from iou_refiner.stage import Stage


class IoURefiner(nn.Module):
    """A frozen detector with the stage in place of its suppression: same call, same output, plus ``ious``.

    Args:
        detector: a live detector of a framework an adapter is installed for, or an :class:`Adapter`.
        head: a trained :class:`IoUPredictor`, or the path of one. Without a head the detector answers alone, untouched.
        settings: of the :class:`Stage`.

    Raises:
        TypeError: no adapter knows the detector. ValueError: the head was trained on another detector.

    A detector in training mode is called as it is: there are no detections to refine.
    """

    def __init__(self, detector: Any, head: IoUPredictor | str | Path | None = None, **settings: Any):
        super().__init__()
        self.adapter = as_adapter(detector)
        self.detector = self.adapter.detector
        self.stage: Stage | None = None
        if head is None:
            if settings:
                raise ValueError(f"Settings of the stage ({', '.join(settings)}) need a `head`.")
            return
        if not isinstance(head, IoUPredictor):
            head = IoUPredictor.load(head)
        check_head(head, self.adapter)
        self.head = head.to(self.adapter.device).eval()
        self.stage = Stage(self.head, **settings)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the detector's own call; boxes, scores and labels are the stage's."""
        if self.stage is None or getattr(self.detector, "training", False):
            return self.detector(*args, **kwargs)
        return self.adapter.run(self.stage, *args, **kwargs)


def check_head(head: IoUPredictor, adapter: Adapter) -> None:
    """Raise ValueError if the head says that it was trained on the features of another detector."""
    if head.detector and head.detector != adapter.fingerprint():
        raise ValueError(
            "The head was trained on a detector with other weights (fingerprint "
            f"{head.detector[:12]}, this one {adapter.fingerprint()[:12]}): its predictions would mean nothing here. "
            "Use the detector it was trained on, or train a head for this one."
        )
