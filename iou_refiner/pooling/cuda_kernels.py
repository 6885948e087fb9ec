"""The CUDA kernels of ``cuda/prroi_pool.cu``: read by path, compiled at run time, launched on torch's current stream.

The only module that imports CuPy, and only inside functions: without CuPy, or without a driver, importing this one
costs nothing and :func:`is_available` says False. Memory comes from torch, nothing waits for the device, and once a
variant has been compiled (by its first call) its launches can be captured in a CUDA graph.

:func:`forward`, :func:`backward_boxes` and :func:`backward_table` do what those of
:mod:`iou_refiner.pooling.portable` do, in float32, from a table of float32, float16 or bfloat16. A box of a map that
does not exist pools to NaN with gradient NaN: looking for one would stop the stream. All three raise TypeError or
ValueError where a dtype, shape or device is not that of :class:`~iou_refiner.pooling.inputs.PoolInputs`, and
RuntimeError where the kernels cannot run on the device of the table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iou_refiner.checks import check_same_device, how_to_install
from iou_refiner.pooling.inputs import PoolInputs

_STORAGE = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
DTYPES = frozenset(_STORAGE)

# Threads per block. The gradient to the table has a block for each row, which should need one pass over the channels.
_THREADS, _TABLE_THREADS = 256, 64
# The forward pass cuts boxes into slices until there are about this many blocks: a wave or more on the largest device.
_ENOUGH_BLOCKS = 2048
_WIDEST_LOAD = 16  # bytes


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for: storage type, bins per side, channels per load."""

    dtype: torch.dtype
    output_size: int
    lanes: int

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options."""
        return (
            "--std=c++17",
            f"-DPRROI_{_STORAGE[self.dtype]}",
            f"-DPRROI_BINS={self.output_size}",
            f"-DPRROI_LANES={self.lanes}",
            f"-DPRROI_THREADS={_THREADS}",
        )


def source() -> str:
    """The text of the kernels, from the folder ``cuda`` in the package (installed) or beside it (a checkout)."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here, here.parent):
        if (path := folder / "cuda" / "prroi_pool.cu").is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"cuda/prroi_pool.cu is neither in {here} nor beside it. Reinstall iou-refiner.")


def lanes_of(channels: int, *tensors: Tensor) -> int:
    """Channels per load: as many as fit into 16 bytes if their number and every address allow it, else one."""
    lanes = _WIDEST_LOAD // tensors[0].element_size()
    aligned = all(tensor.data_ptr() % _WIDEST_LOAD == 0 for tensor in tensors)
    return lanes if channels % lanes == 0 and aligned else 1


@functools.cache
def why_unavailable() -> str:
    """Why CUDA tensors take the portable path, as a clause; empty where the kernels can be used."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        import cupy
    except Exception as error:  # a CuPy that does not match the system fails in ways of its own
        extra = "cuda12" if torch.version.cuda.startswith("12") else "cuda13"
        return f"CuPy is not importable ({error}); {how_to_install(extra)}"
    try:
        cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"CuPy finds no driver or no run-time compiler ({error})"
    return ""


def is_available(device: torch.device) -> bool:
    """Whether tensors on ``device`` can be pooled by these kernels; for any but a CUDA device, CUDA is not touched."""
    return device.type == "cuda" and not why_unavailable()


def forward(inputs: PoolInputs, output_size: int) -> Tensor:
    """Pool boxes to (R, output_size, output_size, C) in the dtype of the table."""
    geometry = _geometry(inputs)
    table, count = inputs.table, len(inputs.boxes)
    output = table.new_empty(count, output_size, output_size, table.shape[1])
    if output.numel():
        variant, packs = _variant(output_size, table, output)
        wanted, possible = -(-_ENOUGH_BLOCKS // count), -(-(output_size**2) * int(packs) // _THREADS)
        grid = (count, min(wanted, possible))
        arguments = (table, np.int64(len(table)), packs, *geometry, np.float32(inputs.shift), output)
        _launch("prroi_forward", variant, table.device, grid, _THREADS, arguments)
    return output


def backward_boxes(grad: Tensor, inputs: PoolInputs) -> Tensor:
    """Gradient to the boxes (R, 4), per network pixel, from ``grad`` (R, P, P, C); the same bits on every run."""
    geometry = _geometry(inputs, grad)
    table, count = inputs.table, len(inputs.boxes)
    output = torch.zeros(count, 4, device=table.device)
    if grad.numel():
        grad = grad.contiguous()
        variant, packs = _variant(grad.shape[1], table, grad)
        arguments = (grad, table, np.int64(len(table)), packs, *geometry, np.float32(inputs.shift), output)
        _launch("prroi_backward_boxes", variant, table.device, (count, 1), _THREADS, arguments)
    return output.to(inputs.boxes.dtype)


def backward_table(grad: Tensor, inputs: PoolInputs) -> Tensor:
    """Gradient to the table (rows, C) in its dtype, summed in float32, box after box: the same bits on every run."""
    geometry = _geometry(inputs, grad)
    table, count = inputs.table, np.int32(len(inputs.boxes))
    if not grad.numel():
        return torch.zeros_like(table)
    grad, output = grad.contiguous(), torch.empty_like(table)
    if len(table):
        variant, packs = _variant(grad.shape[1], grad, output)
        grid = (len(table), -(-int(packs) // _TABLE_THREADS))
        arguments = (grad, np.int64(len(table)), packs, *geometry, count, np.float32(inputs.shift), output)
        _launch("prroi_backward_table", variant, table.device, grid, _TABLE_THREADS, arguments)
    return output


def _geometry(inputs: PoolInputs, grad: Tensor | None = None) -> tuple[Tensor | np.generic, ...]:
    """The arguments of a kernel from the sizes of the maps to the index of the boxes.

    Every tensor is checked first, for the kernels see only addresses.
    """
    table, sizes, offsets, strides, boxes, map_index, _ = inputs
    if table.dtype not in _STORAGE:
        raise TypeError(f"`table` must be float32, float16 or bfloat16, got {table.dtype}.")
    if table.ndim != 2 or not table.is_contiguous():
        raise ValueError(f"`table` must be contiguous of shape (rows, C), got shape {tuple(table.shape)}.")
    boxes = boxes.detach().float()
    maps, count = len(sizes), len(boxes)
    expected: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
        ("sizes", sizes, torch.int32, (maps, 2)),
        ("offsets", offsets, torch.int64, (maps,)),
        ("strides", strides, torch.float32, (maps,)),
        ("boxes", boxes, torch.float32, (count, 4)),
        ("map_index", map_index, torch.int32, (count,)),
    ]
    if grad is not None:
        bins = grad.shape[1] if grad.ndim > 1 else 1
        expected.append(("grad", grad, table.dtype, (count, bins, bins, table.shape[1])))
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"`{name}` must be {dtype}, got {tensor.dtype}.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(tensor.shape)}.")
        check_same_device(name, tensor, "table", table)
    of_maps = (sizes.contiguous(), offsets.contiguous(), strides.contiguous(), np.int32(maps))
    return (*of_maps, boxes.contiguous(), map_index.contiguous())


def _variant(output_size: int, *features: Tensor) -> tuple[Variant, np.int32]:
    """The variant for feature tensors (..., C), and the loads per C; those of a box must fit a 32-bit counter."""
    channels = features[0].shape[-1]
    lanes = lanes_of(channels, *features)
    if output_size * output_size * (channels // lanes) >= 2**31 - 2**20:  # a stride of the grid beyond must fit, too
        raise ValueError(f"`output_size` ({output_size}) squared times C ({channels}) is too large for the kernels.")
    return Variant(features[0].dtype, output_size, lanes), np.int32(channels // lanes)


@functools.cache
def _kernel(name: str, variant: Variant) -> Any:
    # CuPy compiles at the first launch on a device, once for all kernels of a variant, and keeps the result on disk.
    import cupy

    return cupy.RawModule(code=source(), options=variant.options).get_function(name)


class _TorchStream:
    """Torch's current stream, by the protocol that CuPy 14 asks for and older versions of torch lack."""

    def __init__(self, device: torch.device) -> None:
        self.pointer = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


def _launch(
    name: str,
    variant: Variant,
    device: torch.device,
    grid: tuple[int, int],
    threads: int,
    arguments: tuple[Tensor | np.generic, ...],
) -> None:
    """Launch on torch's current stream of ``device``; tensors are handed over by their addresses."""
    if not is_available(device):
        reason = why_unavailable() if device.type == "cuda" else "they take CUDA tensors"
        raise RuntimeError(f"The kernels cannot run on {device}: {reason}.")
    import cupy

    packed = tuple(np.uint64(item.data_ptr()) if isinstance(item, Tensor) else item for item in arguments)
    with torch.cuda.device(device):
        stream = _TorchStream(device)
        from_external = getattr(cupy.cuda.Stream, "from_external", None)  # CuPy 14
        with from_external(stream) if from_external else cupy.cuda.ExternalStream(stream.pointer):
            _kernel(name, variant)(grid, (threads,), packed)
