"""Detectors of torchvision from weights of one's own: how many classes they are for stands in the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from iou_refiner import DataError
from iou_refiner.adapters.weights import tensors_only
from iou_refiner.checks import require

# Where trainers put the weights among other things in a checkpoint.
_INSIDE = ("model", "state_dict", "model_state_dict")


def published(name: str) -> nn.Module:
    """The detector called ``name`` in torchvision's registry, with its best published weights.

    Raises:
        DataError: the weights cannot be fetched, or hold more than tensors. ValueError: no such name.
    """
    models = require("torchvision.models", extra="torchvision", purpose="A torchvision detector")
    url = models.get_model_weights(name).DEFAULT.url
    stored = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    try:
        with tensors_only(f"{name} of torchvision", str(stored)):
            detector: nn.Module = models.get_model(name, weights="DEFAULT")
            return detector
    except OSError as error:  # of the network too
        raise DataError(
            f"The weights of torchvision's {name} cannot be fetched ({error}). They are downloaded once. Without a "
            f"connection: fetch {url} elsewhere and save it as {stored}. For weights of your own: "
            f"torchvision:{name}:WEIGHTS.pth."
        ) from None


def from_file(name: str, path: str) -> nn.Module:
    """The detector called ``name`` with weights of one's own; everything else is torchvision's default.

    Args:
        name: in torchvision's registry.
        path: what ``torch.save`` made of a ``state_dict``, or of a checkpoint that has one under "model" or
            "state_dict", as torchvision's own training script writes; or safetensors.

    Raises:
        DataError: the file is missing, holds more than tensors, or has weights of another detector.
        ValueError: no such name.
    """
    models = require("torchvision.models", extra="torchvision", purpose="A torchvision detector")
    state = _state(path)

    def build(num_classes: int) -> nn.Module:
        detector: nn.Module = models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
        return detector

    detector = build(_num_classes(name, path, state, build))
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise _foreign(name, path, " ".join(first).strip()) from None
    return detector


def _num_classes(name: str, path: str, state: dict[str, Tensor], build: Any) -> int:
    """How many classes the weights are for, told by the layers that grow with them."""
    with torch.device("meta"):
        smaller, larger = build(2).state_dict(), build(3).state_dict()
    growing = {key: len(larger[key]) - len(smaller[key]) for key in larger if larger[key].shape != smaller[key].shape}
    counts = {len(state[key]) / each for key, each in growing.items() if key in state and state[key].ndim}
    if not growing.keys() <= state.keys() or len(counts) != 1 or not next(iter(counts)).is_integer():
        lacking = sorted(growing.keys() - state.keys())
        raise _foreign(name, path, f"{lacking[0]} is missing" if lacking else "its layers are for no number of classes")
    return int(next(iter(counts)))


def _state(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise DataError(f"The weights {path!r}: no such file. Name what torch.save made of a state_dict.")
    if path.endswith(".safetensors"):
        import safetensors.torch

        try:
            return safetensors.torch.load_file(path)
        except Exception as error:  # a damaged file has many ways to fail
            raise DataError(f"The weights {path!r} cannot be read ({error}). Save them again.") from None
    with tensors_only(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (EOFError, KeyError, OSError) as error:
            raise DataError(f"The weights {path!r} cannot be read ({error}). Save them again.") from None
    for inside in _INSIDE:
        if isinstance(content, dict) and isinstance(content.get(inside), dict):
            content = content[inside]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise DataError(f"The weights {path!r} are no state_dict. Save one: torch.save(model.state_dict(), path).")
    return {str(key).removeprefix("module."): value for key, value in content.items()}  # of DistributedDataParallel


def _foreign(name: str, path: str, why: str) -> DataError:
    return DataError(
        f"The weights {path!r} are not of torchvision's {name}: {why}. Name the model they were saved from."
    )
