"""PrRoIPool by torch operators alone: the path of the CPU, of MPS, and of CUDA without CuPy.

The functions share their arguments with :mod:`iou_refiner.pooling.cuda_kernels`; the mathematics stands in
:mod:`iou_refiner.pooling.functional`. All bins of all boxes are one ``embedding_bag`` over the rows of the table, and what is left
to do well is the list of its taps (:mod:`iou_refiner.pooling.taps`), which the gradient to the boxes finds again where the
forward pass has kept it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iou_refiner.pooling.taps import Axes, Taps, chunks, slopes, up_to, weights


def _working(table: Tensor) -> torch.dtype:
    """embedding_bag wants weights of the table's dtype: half features are widened rather than weights rounded."""
    return torch.float32 if table.dtype.itemsize < 4 else table.dtype


def _widened(table: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """The table in its working dtype, and the rows in it: of a half table only those that are touched."""
    if table.dtype == _working(table):
        return table, row
    touched = torch.zeros(len(table), dtype=torch.bool, device=table.device).index_fill_(0, row.long(), True)
    place = touched.cumsum(0, dtype=torch.int32) - 1
    features = table.index_select(0, torch.nonzero(touched).flatten())
    return features.to(_working(table)), place.index_select(0, row)


def _mark_broken(values: Tensor, boxes: Tensor) -> Tensor:
    """NaN for every box that is not finite, in place."""
    return values.index_fill_(0, torch.nonzero(~torch.isfinite(boxes).all(1)).flatten(), torch.nan)


def forward(
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    output_size: int,
    shift: float,
) -> Tensor:
    """Pool boxes to (R, output_size, output_size, C) in the dtype of the table."""
    maps = (table, sizes, offsets, strides, boxes, map_index)
    return forward_keeping(*maps, output_size, shift, keep=False)[0]


def forward_keeping(
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    output_size: int,
    shift: float,
    *,
    keep: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """:func:`forward`, and what :func:`backward_kept` needs of the taps: about as much memory as the result.

    Nothing is kept of more boxes than are handled at once; :func:`backward_boxes` finds their taps again.
    """
    dtype, kept = _working(table), nothing_kept(table)
    shape = (len(boxes), output_size, output_size, table.shape[1])
    out: Tensor | None = None
    for part, axes, taps in chunks(sizes, offsets, strides, boxes, map_index, output_size, shift):
        of_axes = weights(axes)
        features, row = _widened(table, taps.row)
        bags = torch.embedding_bag(features, row, taps.start, False, 0, False, taps.weights(of_axes.to(dtype)))[0]
        if part.stop - part.start == len(boxes):  # all in one piece: nothing is copied
            out = bags.view(shape)
            kept = [*taps, _profile(axes, of_axes, output_size).to(dtype)] if keep else kept
        else:
            out = table.new_empty(shape, dtype=dtype) if out is None else out
            out[part] = bags.view(-1, *shape[1:])
    out = table.new_empty(shape, dtype=dtype) if out is None else out
    return _mark_broken(out, boxes).to(table.dtype), kept


def nothing_kept(table: Tensor, size: Callable[[], int | torch.SymInt] = lambda: 0) -> list[Tensor]:
    """Tensors like those :func:`forward_keeping` keeps, of the lengths that ``size`` says."""
    kept = [table.new_empty(size(), dtype=torch.int32) for _ in Taps._fields]
    return [*kept, table.new_empty(size(), 3, dtype=_working(table))]


def backward_boxes(
    grad: Tensor,
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    shift: float,
) -> Tensor:
    """Gradient to the boxes (R, 4), in pixels, from ``grad`` (R, P, P, C)."""
    dtype, bins = _working(table), grad.shape[1]
    out = table.new_zeros(len(boxes), 4, dtype=dtype)
    for part, axes, taps in chunks(sizes, offsets, strides, boxes, map_index, bins, shift):
        out[part] = _to_boxes(grad[part], table, taps, _profile(axes, weights(axes), bins).to(dtype))
    return _to_pixels(out, strides, boxes, map_index)


def backward_kept(
    grad: Tensor, table: Tensor, strides: Tensor, boxes: Tensor, map_index: Tensor, kept: Sequence[Tensor]
) -> Tensor:
    """:func:`backward_boxes` with the taps that :func:`forward_keeping` kept."""
    *taps, profile = kept
    return _to_pixels(_to_boxes(grad, table, Taps(*taps), profile), strides, boxes, map_index)


def _to_pixels(by_cell: Tensor, strides: Tensor, boxes: Tensor, map_index: Tensor) -> Tensor:
    return _mark_broken(by_cell.to(boxes.dtype) / strides[map_index.long(), None], boxes)


def _profile(axes: Axes, of_axes: Tensor, bins: int) -> Tensor:
    """The weight of each tap along an axis, and its derivatives by the low and the high edge of the box, (A, 3)."""
    return torch.stack([of_axes, *slopes(axes, bins)], 1)


def _to_boxes(grad: Tensor, table: Tensor, taps: Taps, profile: Tensor) -> Tensor:
    """Gradient to the boxes (R, 4), in cells: summed along x over each run, then along y over the runs of a box."""
    bins, (features, row) = grad.shape[1], _widened(table, taps.row)
    # The inner product of each tap's feature row with its bin's gradient.
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


def backward_table(
    grad: Tensor,
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    shift: float,
) -> Tensor:
    """Gradient to the table (rows, C)."""
    dtype = _working(table)
    out = torch.zeros_like(table, dtype=dtype)
    for part, axes, taps in chunks(sizes, offsets, strides, boxes, map_index, grad.shape[1], shift):
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
