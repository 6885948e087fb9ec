"""An adapter for a detector that no installed adapter knows: any torch module, and a function that looks inside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner.boxes import clip_boxes
from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import fingerprint
from iou_refiner.structures import Detections, FeatureMaps, Frame

#: From a detector and a batch as it takes it: feature maps, candidates before suppression, frames; see Adapter.extract.
Look = Callable[..., tuple[FeatureMaps, list[Detections], list[Frame]]]


def as_dicts(found: list[Detections]) -> list[dict[str, Tensor]]:
    """One dict per image, as torchvision's detectors answer: ``boxes``, ``scores``, ``labels``, ``ious`` if known."""
    columns = ("boxes", "scores", "labels", "ious")
    return [{name: getattr(image, name) for name in columns if getattr(image, name) is not None} for image in found]


class OwnAdapter:
    """The adapter of a detector of your own.

    Args:
        detector: the live module, in inference mode.
        look: called with the detector and what the detector is called with; gives feature maps, candidates before
            suppression (one row per box and class, network frame), and per image the frame from the detector's input to
            the network input.
        finish: from the detections of a batch, boxes in pixels of the detector's input and clipped to it, to what the
            detector returns. Default: :func:`as_dicts`.
        prepare: from RGB (H, W, 3) uint8 to one image as the detector takes it, and the frame between. Default: as it
            is, (3, H, W) float in [0, 1].
        category_ids: dataset category id of each label; default: labels are category ids.
        settings: a name for what ``look`` and ``prepare`` decide, such as a score threshold. Feature caches made under
            another name are refused.

    Raises:
        TypeError: the detector is no torch module.
    """

    def __init__(
        self,
        detector: nn.Module,
        look: Look,
        *,
        finish: Callable[[list[Detections]], Any] = as_dicts,
        prepare: Callable[[np.ndarray], tuple[Any, Frame]] | None = None,
        category_ids: dict[int, int] | None = None,
        settings: str = "",
    ):
        if not isinstance(detector, nn.Module):
            raise TypeError(
                f"`detector` must be a torch module, got {type(detector).__name__}. For anything else, write a class "
                "with the methods of iou_refiner.Adapter."
            )
        self.detector: Any = detector
        self.category_ids = category_ids
        self._look, self._finish, self._prepare, self._settings = look, finish, prepare, settings

    @property
    def device(self) -> torch.device:
        """Where the detector's weights are."""
        device: torch.device = next(self.detector.parameters()).device
        return device

    def to(self, device: torch.device | str) -> OwnAdapter:
        """Move the detector."""
        self.detector.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash of all weights and buffers of the detector."""
        return fingerprint(self.detector)

    def settings(self) -> str:
        """What was given as ``settings``."""
        return self._settings

    def prepare(self, rgb: np.ndarray) -> tuple[Any, Frame]:
        """An RGB image (H, W, 3) uint8 as the detector takes it, and the frame between."""
        if self._prepare is not None:
            return self._prepare(rgb)
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 255
        return pixels.to(self.device), Frame((rgb.shape[0], rgb.shape[1]))

    def extract(self, *args: Any, **kwargs: Any) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """What ``look`` sees, without gradients.

        Raises:
            ValueError: it tells of more candidates or frames than of images, or of fewer.
        """
        with torch.no_grad():
            features, candidates, frames = self._look(self.detector, *args, **kwargs)
        if not len(features) == len(candidates) == len(frames):
            raise ValueError(
                f"`look` must give candidates and a frame for each image, got {len(candidates)} and {len(frames)} for "
                f"{len(features)} images."
            )
        return features, candidates, frames

    def run(self, stage: Suppression, *args: Any, **kwargs: Any) -> Any:
        """The detector's call with ``stage`` as its suppression; its own result type, as ``finish`` makes it."""
        return self.twin(stage)(*args, **kwargs)

    def twin(self, stage: Suppression) -> nn.Module:
        """A shallow copy of the detector, sharing every weight, that looks, asks ``stage`` and finishes when called."""
        twin: Any = copy.copy(self.detector)

        def forward(*args: Any, **kwargs: Any) -> Any:
            features, candidates, frames = self.extract(*args, **kwargs)
            with torch.no_grad():
                kept = zip(stage(features, candidates), frames, strict=True)
                return self._finish([_in_image(found, frame) for found, frame in kept])

        twin.forward = forward
        return cast(nn.Module, twin)


def _in_image(found: Detections, frame: Frame) -> Detections:
    """Detections in the network frame, brought back to the image and clipped to it."""
    return found.replace(boxes=clip_boxes(frame.to_image(found.boxes), frame.image_size))
