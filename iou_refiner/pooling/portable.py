"""PrRoIPool by torch operators alone: the path of the CPU, of MPS, and of CUDA without CuPy.

The mathematics is explained in :mod:`iou_refiner.pooling.functional`. A single ``embedding_bag`` over the rows of the
table computes all bins of all boxes; :mod:`iou_refiner.pooling.taps` lists the rows under each bin and their weights.
Listing them takes longer than summing them, so the forward pass keeps the list for the gradient to the boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iou_refiner.pooling.inputs import PoolInputs
from iou_refiner.pooling.taps import Axes, Taps, chunks, slopes, up_to, weights


def forward(inputs: PoolInputs, output_size: int) -> Tensor:
    """Pool boxes to (R, output_size, output_size, C) in the dtype of the table."""
    return _pool(inputs, output_size, keep=False)[0]


def forward_saving(inputs: PoolInputs, output_size: int) -> tuple[Tensor, list[Tensor]]:
    """:func:`forward`, and what :func:`backward_saved` needs of the taps: about as much memory as the result.

    Of more boxes than are handled at once nothing is saved; :func:`backward_boxes` lists their taps again.
    """
    return _pool(inputs, output_size, keep=True)


def nothing_saved(table: Tensor, size: Callable[[], int | torch.SymInt] = lambda: 0) -> list[Tensor]:
    """Tensors like those that :func:`forward_saving` keeps, of the lengths that ``size`` gives."""
    saved = [table.new_empty(size(), dtype=torch.int32) for _ in Taps._fields]
    return [*saved, table.new_empty(size(), 3, dtype=_working(table))]


def backward_boxes(grad: Tensor, inputs: PoolInputs) -> Tensor:
    """Gradient to the boxes (R, 4), per network pixel, from ``grad`` (R, P, P, C)."""
    dtype, bins = _working(inputs.table), grad.shape[1]
    out = inputs.table.new_zeros(len(inputs.boxes), 4, dtype=dtype)
    for part, axes, taps in chunks(inputs, bins):
        out[part] = _to_boxes(grad[part], inputs.table, taps, _profile(axes, weights(axes), bins).to(dtype))
    return _to_pixels(out, inputs)


def backward_saved(grad: Tensor, inputs: PoolInputs, saved: Sequence[Tensor]) -> Tensor:
    """:func:`backward_boxes` with the taps that :func:`forward_saving` saved."""
    *taps, profile = saved
    return _to_pixels(_to_boxes(grad, inputs.table, Taps(*taps), profile), inputs)


def backward_table(grad: Tensor, inputs: PoolInputs) -> Tensor:
    """Gradient to the table (rows, C)."""
    table, dtype = inputs.table, _working(inputs.table)
    out = torch.zeros_like(table, dtype=dtype)
    for part, axes, taps in chunks(inputs, grad.shape[1]):
        upstream = grad[part].reshape(-1, grad.shape[3]).to(dtype)
        out += torch.ops.aten._embedding_bag_dense_backward(
            upstream,
            taps.row,
            taps.bin(),
            taps.size,
            taps.start,
            len(table),
            False,
            0,
            taps.weights(weights(axes).to(dtype)),
            -1,
        )
    return out.to(table.dtype)


def _pool(inputs: PoolInputs, output_size: int, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
    table, count = inputs.table, len(inputs.boxes)
    dtype, saved = _working(table), nothing_saved(table)
    shape = (count, output_size, output_size, table.shape[1])
    out: Tensor | None = None
    for part, axes, taps in chunks(inputs, output_size):
        of_axes = weights(axes)
        features, row = _widened(table, taps.row)
        bags = torch.embedding_bag(features, row, taps.start, False, 0, False, taps.weights(of_axes.to(dtype)))[0]
        if part.stop - part.start == count:  # all in one piece: nothing is copied
            out = bags.view(shape)
            saved = [*taps, _profile(axes, of_axes, output_size).to(dtype)] if keep else saved
        else:
            out = table.new_empty(shape, dtype=dtype) if out is None else out
            out[part] = bags.view(-1, *shape[1:])
    out = table.new_empty(shape, dtype=dtype) if out is None else out
    return _mark_broken(out, inputs.boxes).to(table.dtype), saved


def _working(table: Tensor) -> torch.dtype:
    """embedding_bag wants weights of the table's dtype: half features are widened rather than weights rounded."""
    return torch.float32 if table.dtype.itemsize < 4 else table.dtype


def _widened(table: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """The table in its working dtype, and the rows in it; of a half table, only the rows that are touched."""
    if table.dtype == _working(table):
        return table, row
    touched = torch.zeros(len(table), dtype=torch.bool, device=table.device).index_fill_(0, row.long(), True)
    place = touched.cumsum(0, dtype=torch.int32) - 1
    features = table.index_select(0, torch.nonzero(touched).flatten())
    return features.to(_working(table)), place.index_select(0, row)


def _mark_broken(values: Tensor, boxes: Tensor) -> Tensor:
    """NaN for every box that is not finite, in place."""
    return values.index_fill_(0, torch.nonzero(~torch.isfinite(boxes).all(1)).flatten(), torch.nan)


def _profile(axes: Axes, of_axes: Tensor, bins: int) -> Tensor:
    """The weight of each tap along an axis, and its derivatives by the low and the high edge of the box, (A, 3)."""
    return torch.stack([of_axes, *slopes(axes, bins)], 1)


def _to_boxes(grad: Tensor, table: Tensor, taps: Taps, profile: Tensor) -> Tensor:
    """Gradient to the boxes (R, 4), per cell: summed along x over each run, then along y over the runs of a box."""
    bins, (features, row) = grad.shape[1], _widened(table, taps.row)
    # The inner product of each tap's feature row with the gradient of its bin.
    inner = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad.reshape(-1, grad.shape[3]).to(features.dtype),
        features,
        row,
        taps.start,
        taps.bin(),
        0,
    )
    along_x = torch.embedding_bag(profile, taps.x, taps.run_start, False, 0, False, inner)[0]
    along_y = profile.index_select(0, taps.run_y)
    by_edge = torch.cat([along_x[:, 1:] * along_y[:, :1], along_x[:, :1] * along_y[:, 1:]], 1)  # x1, x2, y1, y2
    first_bin = torch.arange(0, len(taps.start), bins**2, dtype=torch.int32, device=grad.device)
    first_run = torch.searchsorted(taps.run_bin, first_bin, out_int32=True)
    by_box: Tensor = torch.embedding_bag(by_edge, up_to(taps.run_bin), first_run)[0]
    return by_box[:, [0, 2, 1, 3]]


def _to_pixels(by_cell: Tensor, inputs: PoolInputs) -> Tensor:
    """A gradient per cell as one per network pixel, in the dtype of the boxes."""
    strides = inputs.strides[inputs.map_index.long(), None]
    return _mark_broken(by_cell.to(inputs.boxes.dtype) / strides, inputs.boxes)
