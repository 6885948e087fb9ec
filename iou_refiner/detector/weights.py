"""A detector's weights as a file of tensors, beside the head that was trained together with it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from iou_refiner.checks import DataError, shown
from iou_refiner.files import write_whole


def save_weights(module: nn.Module, path: Path) -> None:
    """Write all weights and buffers to a safetensors file, whole or not at all; the same weights give the same bytes.

    A copy of each: layers may share a tensor, which the file has no way to say.
    """
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    write_whole(path, safetensors.torch.save(tensors))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module with what :func:`save_weights` kept. Where they do not fit, the module stays as it is.

    Raises:
        DataError: the file is missing or damaged, or its tensors are not those of the module.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Name the folder that IoURefiner.save wrote.") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}). Copy it again.") from None
    expected = module.state_dict()
    wrong = sorted(tensors.keys() ^ expected.keys()) or [
        name for name, tensor in tensors.items() if _kind(tensor) != _kind(expected[name])
    ]
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} tensors are not those of this {type(module).__name__} (first: {shown(wrong[0])}). "
            "Build the detector as it was when it was saved, with as many classes."
        )
    module.load_state_dict(tensors)


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
