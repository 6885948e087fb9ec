"""The file of a head: safetensors, with what it says about itself in one metadata key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iou_refiner.checks import DataError
from iou_refiner.files import write_whole

_FORMAT = "iou-refiner head 4"


def write_head(
    path: str | Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor], notes: Mapping[str, Any]
) -> None:
    """Write settings, weights and notes (json), whole or not at all.

    Raises:
        ValueError: a note is called what the file itself needs.
    """
    if taken := {"format", "settings"} & notes.keys():
        raise ValueError(f"`notes` may not be called {' or '.join(sorted(taken))}: the file needs these names.")
    about = {"format": _FORMAT, "settings": settings, **notes}
    # One key: safetensors writes several in a random order, and the same head should give the same bytes.
    metadata = {"iou_refiner": json.dumps(about, sort_keys=True)}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_whole(Path(path), safetensors.torch.save(plain, metadata))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a head file says about itself (``settings`` and the notes it was saved with), without its weights.

    Raises:
        DataError: the file is missing, damaged, or not a head.
    """
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("iou_refiner", "{}"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Train a head with: iou-refiner train") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}).") from None
    found = about.get("format") if isinstance(about, dict) else None
    if found != _FORMAT:
        raise DataError(f"{path}: not a head of this version (format {found!r}, need {_FORMAT!r}).")
    return about
