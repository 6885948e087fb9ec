"""The wrapper that puts the stage into a live detector, and trains a head with it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from iou_refiner.checks import DataError
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.registry import as_adapter
from iou_refiner.detector.weights import load_weights, save_weights
from iou_refiner.head.checkpoint import Head, load_head, save_head
from iou_refiner.head.config import TrainedCategory
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps

_DETECTOR, _HEAD = "detector.safetensors", "head.safetensors"


class IoURefiner(nn.Module):
    """A detector with the stage in place of its suppression: same call, same output, plus ``ious``.

    In training mode (``refiner.train()``) the call is the detector's own training call, and its losses come with those
    of the head: ``loss_iou``, and ``loss_iou_ranking`` and ``loss_iou_deltas`` where the head has these outputs. Any
    loop that trains the detector then trains both (docs/joint.md). With the detector alone in training mode
    (``refiner.detector.train()``, or ``refiner.head.eval()`` after ``refiner.train()``) it is called as it is.

    Args:
        detector: a live detector of a framework an adapter is installed for, or an :class:`Adapter`.
        head: a trained :class:`IoUHead` or :class:`SiblingHead`, or the path of one. Without a head the detector runs
            alone, untouched.
        settings: of the :class:`Stage`; default: what the head recommends.
        loss_weight: of the head's losses in training. At 0 the detector's losses and gradients are its own.
        changes: settings to exchange in these, by name.

    Raises:
        TypeError: no adapter knows the detector.
        ValueError: a setting is unknown or out of range.
        DataError: the head was trained on another detector.

    Warns:
        UserWarning: once, when the detector has candidates of categories that the head was not trained on. They keep
            the detector's own suppression, box and score; ``all_categories=True`` applies the head to them too.
    """

    def __init__(
        self,
        detector: Any,
        head: Head | str | Path | None = None,
        settings: StageSettings | None = None,
        *,
        loss_weight: float = 1.0,
        **changes: Any,
    ):
        super().__init__()
        self.adapter = as_adapter(detector)
        self.detector = self.adapter.detector
        self.loss_weight = loss_weight
        self.stage: Stage | None = None
        if head is None:
            if settings or changes:
                names = ", ".join(changes) or "settings"
                raise ValueError(f"Settings of the stage ({names}) need a `head`.")
            return
        self.head = load_head(head) if isinstance(head, (str, Path)) else head
        self.stage = stage_on(self.adapter, self.head.eval(), settings, **changes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the detector's own call; boxes, scores and labels are the stage's. No images give no results.

        In training mode as its own training call, and the result its losses and those of the head, by name.

        Raises:
            TypeError: in training mode, the detector or the head is of a kind that is not trained with the other.
            ValueError: in training mode, the head has a network over siblings, or the weight is out of range.
        """
        if not kwargs and len(args) == 1 and isinstance(args[0], (list, tuple)) and not args[0]:
            return []
        if self.stage is not None and self.adapter.training and self.head.training:
            from iou_refiner.training.joint import added_losses  # it brings the parser of annotations along

            return self.adapter.losses(added_losses(self.head, self.loss_weight), *args, **kwargs)
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

    def save(self, folder: str | Path) -> None:
        """Keep detector and head in a folder, each file written beside its place and renamed: ``detector.safetensors``
        with the detector's weights and buffers, and ``head.safetensors``, which belongs to these weights from then on.

        Raises:
            ValueError: there is no head, or the detector is no torch module.
        """
        if self.stage is None or not isinstance(self.detector, nn.Module):
            raise ValueError(
                "`save` keeps a detector that is a torch module, and its head; here one of them is missing."
            )
        from iou_refiner.training.joint import belonging_to

        self.head.metadata = belonging_to(self.head, self.adapter)
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_weights(self.detector, Path(folder) / _DETECTOR)
        save_head(self.head, Path(folder) / _HEAD)  # last: it says whose it is

    @classmethod
    def load(
        cls, folder: str | Path, detector: Any, settings: StageSettings | None = None, **options: Any
    ) -> IoURefiner:
        """What :meth:`save` kept, in inference mode.

        Args:
            folder: that was saved to.
            detector: a detector of the same architecture, as for :class:`IoURefiner`; its weights are replaced.
            settings, options: as for :class:`IoURefiner`.

        Raises:
            DataError: a file is missing or damaged, holds weights of another architecture, or those of another
                training than the head's.
        """
        adapter = as_adapter(detector)
        load_weights(adapter.detector, Path(folder) / _DETECTOR)
        adapter.detector.eval()
        return cls(adapter, Path(folder) / _HEAD, settings, **options)

    def native(self) -> Any:
        """The detector with the stage in it, as an object of the framework's own class, for code that asks for one
        (``inference_detector`` of mmdet). It shares all weights with the detector, which stays as it is."""
        return self.detector if self.stage is None else self.adapter.twin(self._suppress)


def stage_on(adapter: Adapter, head: Head, settings: StageSettings | None = None, **changes: Any) -> Stage:
    """The stage that stands in the place of a detector's suppression; the head goes to the detector's device.

    Args:
        adapter: the detector.
        head, settings, changes: as for :class:`Stage`.

    Raises:
        DataError: the head was trained on another detector. ValueError: as :class:`Stage`.
    """
    check_head(head, adapter)
    return Stage(head.to(adapter.device), settings, own_threshold=adapter.nms_threshold, **changes)


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
