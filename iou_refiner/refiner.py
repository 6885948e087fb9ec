"""The wrapper that puts the stage into a live detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.registry import as_adapter, detector_name
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.stage.stage import Stage


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
            return getattr(self.adapter, "answer", self.detector)(*args, **kwargs)
        return self.adapter.run(self.stage, *args, **kwargs)

    def native(self) -> Any:
        """The detector with the stage in it, as an object of the framework's own class, for code that asks for one
        (``inference_detector`` of mmdet). It shares all weights with the detector, which stays as it is.

        Raises:
            TypeError: the detector has no live object of its own to stand in for.
        """
        if self.stage is None:
            return self.detector
        if not hasattr(self.adapter, "twin"):
            raise TypeError(f"{type(self.adapter).__name__} has no `twin`: call the IoURefiner itself.")
        return self.adapter.twin(self.stage)


def check_head(head: IoUPredictor, adapter: Adapter) -> None:
    """Raise ValueError if the head says that it was trained on the features of another detector."""
    here = adapter.fingerprint()
    if head.detector and head.detector != here:
        raise ValueError(
            f"The head was trained on the detector {head.detector_name or 'without a name'} {head.detector[:12]}, this "
            f"one is {detector_name(adapter)} {here[:12]}: its predictions would mean nothing here. Use the detector "
            "it was trained on, or train a head for this one."
        )
