"""The file of a head: safetensors, with its architecture and metadata in one metadata key."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from iou_refiner.checks import DataError
from iou_refiner.files import write_whole
from iou_refiner.head.config import HeadConfig, HeadMetadata
from iou_refiner.head.iou_head import IoUHead

_FORMAT = "iou-refiner head 5"

T = TypeVar("T", HeadConfig, HeadMetadata)


def save_head(head: IoUHead, path: str | Path) -> None:
    """Write a head to a safetensors file, whole or not at all; the same head gives the same bytes."""
    architecture = {"channels": head.channels, "strides": head.strides, "num_classes": head.num_classes}
    about = {
        "format": _FORMAT,
        "architecture": architecture | {"config": asdict(head.config)},
        "metadata": asdict(head.metadata),
    }
    # One key: safetensors writes several in a random order.
    text = {"iou_refiner": json.dumps(about, sort_keys=True)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_whole(Path(path), safetensors.torch.save(weights, text))


def load_head(path: str | Path, *, device: torch.device | str = "cpu") -> IoUHead:
    """Read a head written by :func:`save_head`, in inference mode.

    Raises:
        DataError: the file is missing, damaged, or not a head.
    """
    about = describe_head(path)
    try:
        architecture = dict(about["architecture"])
        config = _made(HeadConfig, architecture.pop("config"))
        head = IoUHead(**architecture, config=config, metadata=_made(HeadMetadata, about["metadata"]))
        head.load_state_dict(safetensors.torch.load_file(path))
    except (KeyError, TypeError, ValueError, RuntimeError, msgspec.ValidationError) as error:
        raise DataError(f"{path}: description and weights do not make a head ({error}).") from None
    return head.to(device).eval()


def describe_head(path: str | Path) -> dict[str, Any]:
    """What a head file says about itself, ``architecture`` and ``metadata``, without its weights.

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
    format_ = about.get("format") if isinstance(about, dict) else None
    if format_ != _FORMAT:
        raise DataError(f"{path}: not a head of this version (format {format_!r}, need {_FORMAT!r}).")
    return about


def _made(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass of these values, all checked: a field that it does not know would change what the head does."""
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}")
    return msgspec.convert(values, kind)
