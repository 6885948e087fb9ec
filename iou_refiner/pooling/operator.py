"""The operator of PrRoIPool: one schema for every backend, known to torch.compile, autograd and opcheck.

Its arguments are those of :mod:`iou_refiner.pooling.cuda_kernels`. Besides the pooled boxes it returns what its own gradient to the
boxes can use again, where ``keep`` says that one will be asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iou_refiner.pooling import cuda_kernels, portable


def _backend(table: Tensor) -> Any:
    fit = cuda_kernels.is_available(table.device) and table.dtype in cuda_kernels.DTYPES
    return cuda_kernels if fit else portable


@torch.library.custom_op("iou_refiner::prroi_pool", mutates_args=())
def pool(
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    output_size: int,
    shift: float,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    backend = _backend(table)
    maps = (table, sizes, offsets, strides, boxes, map_index, output_size, shift)
    if keep and backend is portable:
        return portable.forward_keeping(*maps)
    return backend.forward(*maps), portable.nothing_kept(table)


@torch.library.custom_op("iou_refiner::prroi_pool_grad_boxes", mutates_args=())
def _grad_boxes(
    grad: Tensor,
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    shift: float,
    kept: list[Tensor],
) -> Tensor:
    if len(kept[0]):
        return portable.backward_kept(grad, table, strides, boxes, map_index, kept)
    out: Tensor = _backend(table).backward_boxes(grad, table, sizes, offsets, strides, boxes, map_index, shift)
    return out


@torch.library.custom_op("iou_refiner::prroi_pool_grad_table", mutates_args=())
def _grad_table(
    grad: Tensor,
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    shift: float,
) -> Tensor:
    out: Tensor = _backend(table).backward_table(grad, table, sizes, offsets, strides, boxes, map_index, shift)
    return out


@pool.register_fake
def _(table, sizes, offsets, strides, boxes, map_index, output_size, shift, keep):  # type: ignore[no-untyped-def]
    pooled = table.new_empty(boxes.shape[0], output_size, output_size, table.shape[1])
    size = torch.library.get_ctx().new_dynamic_size if keep else lambda: 0
    return pooled, portable.nothing_kept(table, size)


@_grad_boxes.register_fake
def _(grad, table, sizes, offsets, strides, boxes, map_index, shift, kept):  # type: ignore[no-untyped-def]
    return torch.empty_like(boxes)


@_grad_table.register_fake
def _(grad, table, sizes, offsets, strides, boxes, map_index, shift):  # type: ignore[no-untyped-def]
    return torch.empty_like(table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, _, ctx.shift, _ = inputs
    ctx.mark_non_differentiable(*output[1])
    ctx.save_for_backward(*tensors, *output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    saved, grad = ctx.saved_tensors, grad.contiguous()
    grad_table = _grad_table(grad, *saved[:6], ctx.shift) if ctx.needs_input_grad[0] else None
    grad_boxes = _grad_boxes(grad, *saved[:6], ctx.shift, saved[6:]) if ctx.needs_input_grad[4] else None
    return grad_table, None, None, None, grad_boxes, None, None, None, None


pool.register_autograd(_backward, setup_context=_save)
