"""The file of a head: safetensors, with its architecture and metadata in one metadata key.

A file of a stranger is data: nothing is built from its description before the description is known to fit the tensors
that are really there, and no size is taken from it on trust.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iou_refiner.checks import DataError, check_choice, check_number
from iou_refiner.files import to_json, write_whole
from iou_refiner.head.config import HeadConfig, HeadMetadata
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.siblings.config import SiblingConfig

_FORMAT = "iou-refiner head 6"
_MOST_FEATURE_LEVELS, _MOST_CLASSES, _MOST_INPUT_CHANNELS = 32, 100_000, 65_536

#: What a head file may hold: a head that reads features, with or without a network over siblings; or that alone.
Head = IoUHead | SiblingHead

T = TypeVar("T", HeadConfig, HeadMetadata, SiblingConfig)


def save_head(head: Head, path: str | Path) -> None:
    """Write a head to a safetensors file, whole or not at all; the same head gives the same bytes."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    about = {
        "format": _FORMAT,
        "kind": _kind(head),
        "architecture": head.architecture,
        "metadata": asdict(head.metadata),
        "checksum": _checksum(weights),
    }
    # One key: safetensors writes several in a random order.
    text = {"iou_refiner": to_json(about, sort_keys=True)}
    write_whole(Path(path), safetensors.torch.save(weights, text))


def load_head(path: str | Path, *, device: torch.device | str = "cpu") -> Head:
    """Read a head written by :func:`save_head`, in inference mode.

    Raises:
        DataError: the file is missing, damaged, or not a head.
    """
    about = describe_head(path)
    try:
        head = _on_meta(about)
        _check_shapes(head, path)
        weights = safetensors.torch.load_file(path)
        _check_weights(weights, about.get("checksum"))
        head.to_empty(device="cpu").load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError, msgspec.ValidationError) as error:
        raise _not_a_head(path, error) from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}). {_CURE}") from None
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
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}). {_CURE}") from None
    format_ = about.get("format") if isinstance(about, dict) else None
    if format_ != _FORMAT:
        raise DataError(
            f"{path}: not a head of this version (format {format_!r}, need {_FORMAT!r}). "
            "Give the head.safetensors that `iou-refiner train` wrote, or train again."
        )
    try:
        _read(about)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise _not_a_head(path, error) from None
    return about


_CURE = "Copy it again, or train another head: iou-refiner train"


def _not_a_head(path: str | Path, error: Exception) -> DataError:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return DataError(f"{path}: description and weights do not make a head ({what}). {_CURE}")


def _kind(head: Head) -> str:
    return "siblings" if isinstance(head, SiblingHead) else "iou"


def _read(about: Mapping[str, Any]) -> tuple[type[Head], dict[str, Any]]:
    """The class of the head and what it is made from, each part checked by itself."""
    architecture, metadata = dict(about["architecture"]), _made(HeadMetadata, about["metadata"])
    check_choice("kind", about["kind"], ["iou", "siblings"])
    siblings = architecture.pop("siblings")
    siblings = None if siblings is None else _made(SiblingConfig, siblings)
    if about["kind"] == "siblings":
        if siblings is None or architecture:
            raise ValueError("a head without features needs `siblings` in its architecture, and nothing else")
        return SiblingHead, {"config": siblings, "metadata": metadata}
    config = _made(HeadConfig, architecture.pop("config"))
    _check_levels(architecture)
    return IoUHead, {**architecture, "config": config, "metadata": metadata, "siblings": siblings}


def _check_levels(architecture: Mapping[str, Any]) -> None:
    """Raise ValueError unless channels, strides and classes are numbers that a detector may have."""
    unknown = sorted(set(architecture) - {"channels", "strides", "num_classes"})
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}")
    for name, most in (("channels", _MOST_INPUT_CHANNELS), ("strides", 1e6)):
        values = architecture[name]
        if not isinstance(values, list) or not 0 < len(values) <= _MOST_FEATURE_LEVELS:
            raise ValueError(f"`{name}` must be a list of 1 to {_MOST_FEATURE_LEVELS} numbers")
        for value in values:
            check_number(name, value, 1 if name == "channels" else 1e-6, most, whole=name == "channels")
    check_number("num_classes", architecture.get("num_classes", 0), 0, _MOST_CLASSES, whole=True)


def _on_meta(about: Mapping[str, Any]) -> Head:
    """The head of a description, with shapes and without memory."""
    kind, parts = _read(about)
    with torch.device("meta"):
        return kind(**parts)


def _check_shapes(head: Head, path: str | Path) -> None:
    """Raise ValueError unless the file holds exactly the tensors of the head."""
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        there = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    missing, further = sorted(expected.keys() - there.keys()), sorted(there.keys() - expected.keys())
    if missing or further:
        raise ValueError(f"missing weights: {missing[:5]}, weights too many: {further[:5]}")
    for name, (shape, dtype) in there.items():
        if shape != expected[name]:
            raise ValueError(f"{name} has shape {shape}, the description says {expected[name]}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{name} has dtype {dtype}, expected floating point")


def _check_weights(weights: Mapping[str, Tensor], checksum: object) -> None:
    """Raise ValueError if a weight is not finite, or the weights are not those that were saved."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    if checksum is not None and checksum != _checksum(weights):  # heads of before have none
        raise ValueError("the weights are not those that were saved: their checksum differs")


def _checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, kinds, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _made(kind: type[T], values: dict[str, Any]) -> T:
    """The dataclass of these values, all checked: a field that it does not know would change what the head does."""
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}")
    return msgspec.convert(values, kind)
