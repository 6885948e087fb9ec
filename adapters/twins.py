"""What the adapters of live detectors share: copies that share every weight, and a look at what a stage would see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from iou_refiner import Detections, FeatureMaps
from iou_refiner.detector.adapter import Suppression


def shallow(module: nn.Module, **changes: Any) -> Any:
    """A copy that shares all weights and submodules, with some attributes or submodules exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin


def seen_by_stage(run: Callable[[Suppression, Any], Any], images: Any) -> tuple[FeatureMaps, list[Detections]]:
    """The feature maps and candidates that ``run`` gives its stage; the detector goes on with no boxes."""
    seen: list[tuple[FeatureMaps, list[Detections]]] = []

    def look(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        seen.append((features, candidates))
        return [found[:0] for found in candidates]

    run(look, images)
    ((features, candidates),) = seen
    return features, candidates
