"""The operators of PrRoIPool, known to torch.compile, autograd and opcheck, whichever backend does the work.

Where ``keep`` says that a gradient to the boxes will be asked for, :func:`pool` also returns what that gradient can use
again.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from iou_refiner.pooling import cuda_kernels, portable
from iou_refiner.pooling.inputs import PoolInputs

# The fields of PoolInputs as torch.library wants them: one argument each.
_INPUTS = ", ".join(f"{'float' if name == 'shift' else 'Tensor'} {name}" for name in PoolInputs._fields)


class _Backend(Protocol):
    """The modules :mod:`~iou_refiner.pooling.portable` and :mod:`~iou_refiner.pooling.cuda_kernels`."""

    def forward(self, inputs: PoolInputs, output_size: int) -> Tensor: ...
    def backward_boxes(self, grad: Tensor, inputs: PoolInputs) -> Tensor: ...
    def backward_table(self, grad: Tensor, inputs: PoolInputs) -> Tensor: ...


def _backend(table: Tensor) -> _Backend:
    suitable = cuda_kernels.is_available(table.device) and table.dtype in cuda_kernels.DTYPES
    return cuda_kernels if suitable else portable


@torch.library.custom_op(
    "iou_refiner::prroi_pool",
    mutates_args=(),
    schema=f"({_INPUTS}, int output_size, bool keep) -> (Tensor, Tensor[])",
)
def pool(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """Pool boxes to (R, output_size, output_size, C); also returns what is saved for the gradient to the boxes.

    Called as ``pool(*inputs, output_size, keep)`` with :class:`~iou_refiner.pooling.inputs.PoolInputs`.
    """
    *fields, output_size, keep = arguments
    inputs = PoolInputs(*fields)
    backend = _backend(inputs.table)
    if keep and backend is portable:
        return portable.forward_saving(inputs, output_size)
    return backend.forward(inputs, output_size), portable.nothing_saved(inputs.table)


@torch.library.custom_op(
    "iou_refiner::prroi_pool_grad_boxes", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}, Tensor[] saved) -> Tensor"
)
def _grad_boxes(grad: Tensor, *arguments: Any) -> Tensor:
    *fields, saved = arguments
    inputs = PoolInputs(*fields)
    if len(saved[0]):
        return portable.backward_saved(grad, inputs, saved)
    return _backend(inputs.table).backward_boxes(grad, inputs)


@torch.library.custom_op(
    "iou_refiner::prroi_pool_grad_table", mutates_args=(), schema=f"(Tensor grad, {_INPUTS}) -> Tensor"
)
def _grad_table(grad: Tensor, *fields: Any) -> Tensor:
    inputs = PoolInputs(*fields)
    return _backend(inputs.table).backward_table(grad, inputs)


@pool.register_fake
def _(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *fields, output_size, keep = arguments
    inputs = PoolInputs(*fields)
    pooled = inputs.table.new_empty(inputs.boxes.shape[0], output_size, output_size, inputs.table.shape[1])
    size = torch.library.get_ctx().new_dynamic_size if keep else lambda: 0
    return pooled, portable.nothing_saved(inputs.table, size)


@_grad_boxes.register_fake
def _(grad: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(PoolInputs(*arguments[:-1]).boxes)


@_grad_table.register_fake
def _(grad: Tensor, *fields: Any) -> Tensor:
    return torch.empty_like(PoolInputs(*fields).table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, ctx.shift, _, _ = inputs  # the names of these three parameters are torch's
    ctx.mark_non_differentiable(*output[1])
    ctx.save_for_backward(*tensors, *output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Gradients to the arguments of :func:`pool`, of which only the table and the boxes have any."""
    table, sizes, offsets, strides, boxes, map_index, *saved = ctx.saved_tensors
    inputs = PoolInputs(table, sizes, offsets, strides, boxes, map_index, ctx.shift)
    grad = grad.contiguous()
    grad_table = _grad_table(grad, *inputs) if ctx.needs_input_grad[0] else None
    grad_boxes = _grad_boxes(grad, *inputs, saved) if ctx.needs_input_grad[4] else None
    return grad_table, None, None, None, grad_boxes, None, None, None, None


pool.register_autograd(_backward, setup_context=_save)
