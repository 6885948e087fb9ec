"""An adapter for a detector that no installed adapter knows: a torch module, and a function that runs it in parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner.detector.adapter import Adapter, Suppression
from iou_refiner.structures import Detections, FeatureMaps, ImageTransform

#: From a detector and a batch as it takes it: feature maps, candidates before suppression, and transforms; see
#: :meth:`Adapter.extract`.
Extract = Callable[..., tuple[FeatureMaps, list[Detections], list[ImageTransform]]]


def as_dicts(detections: list[Detections]) -> list[dict[str, Tensor]]:
    """One dict per image, as torchvision's detectors return: ``boxes``, ``scores``, ``labels``, ``ious`` if known."""
    return [image.to_dict() for image in detections]


class CustomAdapter(Adapter):
    """The adapter of a detector of your own.

    Args:
        detector: the live module, in inference mode.
        extract: called with the detector and what the detector is called with; gives feature maps, candidates before
            suppression (one row per box and class, network pixels), and per image the transform from the detector's
            input to the network input.
        finish: from the detections of a batch, boxes in pixels of the detector's input and clipped to it, to what the
            detector returns. Default: :func:`as_dicts`.
        prepare: from RGB (H, W, 3) uint8 to one image as the detector takes it, and the transform between. Default: as
            it is, (3, H, W) float in [0, 1].
        category_ids: dataset category id of each label; default: labels are category ids.
        settings: a name for what ``extract`` and ``prepare`` decide, such as a score threshold. Feature caches made
            under another name are refused.

    Raises:
        TypeError: the detector is no torch module.
    """

    def __init__(
        self,
        detector: nn.Module,
        extract: Extract,
        *,
        finish: Callable[[list[Detections]], Any] = as_dicts,
        prepare: Callable[[np.ndarray], tuple[Any, ImageTransform]] | None = None,
        category_ids: dict[int, int] | None = None,
        settings: str = "",
    ):
        if not isinstance(detector, nn.Module):
            raise TypeError(
                f"`detector` must be a torch module, got {type(detector).__name__}. For anything else, write a "
                "subclass of iou_refiner.Adapter."
            )
        self.detector = detector
        self.category_ids = category_ids
        self._extract, self._finish, self._prepare, self._settings = extract, finish, prepare, settings

    def settings(self) -> str:
        """What was given as ``settings``."""
        return self._settings

    def prepare(self, rgb: np.ndarray) -> tuple[Any, ImageTransform]:
        """An RGB image (H, W, 3) uint8 as the detector takes it, and the transform between."""
        if self._prepare is not None:
            return self._prepare(rgb)
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().float() / 255
        return pixels.to(self.device), ImageTransform((rgb.shape[0], rgb.shape[1]))

    def extract(self, *args: Any, **kwargs: Any) -> tuple[FeatureMaps, list[Detections], list[ImageTransform]]:
        """What the function ``extract`` gives, without gradients.

        Raises:
            ValueError: it gives more lists of candidates or transforms than there are images, or fewer.
        """
        with torch.no_grad():
            features, candidates, transforms = self._extract(self.detector, *args, **kwargs)
        if not len(features) == len(candidates) == len(transforms):
            raise ValueError(
                f"`extract` must give candidates and a transform for each image, got {len(candidates)} and "
                f"{len(transforms)} for {len(features)} images."
            )
        return features, candidates, transforms

    def transforms(self, images: Any, features: FeatureMaps) -> list[ImageTransform]:
        """From the detector's input to the network input, as the function ``extract`` says."""
        return self.extract(images)[2]

    def twin(self, suppression: Suppression) -> nn.Module:
        """A shallow copy of the detector that shares every weight; when called, it extracts, suppresses, finishes."""
        twin: Any = copy.copy(self.detector)

        def forward(*args: Any, **kwargs: Any) -> Any:
            features, candidates, transforms = self.extract(*args, **kwargs)
            with torch.no_grad():
                detections = zip(suppression(features, candidates), transforms, strict=True)
                return self._finish([transform.detections_to_image(image) for image, transform in detections])

        twin.forward = forward
        return cast(nn.Module, twin)
