"""PrRoIPool by torch operators alone: the path of the CPU, of MPS, and of CUDA without CuPy.

The three functions at the end share their arguments with :mod:`iou_refiner.kernels`; the mathematics stands in
:mod:`iou_refiner.pooling`. All bins of all boxes are one ``embedding_bag`` over the rows of the table, and what is left
to do well is the list of its taps. Weights belong to an axis, not to a tap: they are computed once per (bin, cell) of
each axis, in float64, and multiplied where a row and a column meet. Nothing is padded to the widest box, and what is as
long as the taps is 32 bits wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Taps handled at once: bounds the scratch memory, to about 25 bytes a tap, whatever the boxes.
_CHUNK_TAPS = 500_000


class _Axis(NamedTuple):
    """The taps along one axis, bin after bin, box after box."""

    first: Tensor  # (R * P,) int32, first cell under each bin
    cells: Tensor  # (R * P,) int32, cells under it
    start: Tensor  # (R * P,) int32, where its taps start
    bin: Tensor  # (A,) int32, the bin each tap belongs to
    cell: Tensor  # (A,) int32
    a: Tensor  # (A,) float64, edges of the bin, in cells from the tap's own
    b: Tensor  # (A,)


class _Taps(NamedTuple):
    """Every (bin, cell) pair of a set of boxes, bin by bin, as embedding_bag wants them."""

    row: Tensor  # (K,) int32, row of the table
    start: Tensor  # (R * P * P,) int32, first tap of each bin
    size: Tensor  # (R * P * P,) int32, number of its taps
    x: Tensor  # (K,) int32, the tap along x
    run: Tensor  # (K,) int32, the run it belongs to: the taps of one bin in one feature row
    run_y: Tensor  # (runs,) int32, the tap along y of each run
    run_bin: Tensor  # (runs,) int32, the bin it belongs to

    def of_y(self, values: Tensor) -> Tensor:
        """A value of each tap along y for every tap, (K,)."""
        return values.index_select(0, self.run_y).index_select(0, self.run)

    def of_x(self, values: Tensor) -> Tensor:
        """A value of each tap along x for every tap, (K,)."""
        return values.index_select(0, self.x)


def _pieces(axis: _Axis) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The two stretches of each bin over which the hat of the cell is linear: share of the bin, middle, slope."""
    length = axis.b - axis.a
    for low, high in ((-1, 0), (0, 1)):
        start, end = axis.a.clamp(low, high), axis.b.clamp(low, high)
        yield (end - start) / length, (start + end) / 2, -1 if low == 0 else 1


def _weight(axis: _Axis) -> Tensor:
    """Mean of the hat of each tap's cell over its bin, (A,): its values in the middle of each stretch, by their share.

    Differences of its integral would say the same, but lose their digits in a bin of a millionth of a cell.
    """
    (left, low, _), (right, high, _) = _pieces(axis)
    return left * (1 + low) + right * (1 - high)


def _slopes(axis: _Axis, bins: int) -> tuple[Tensor, Tensor]:
    """Derivatives of the weights by the low and the high edge of the box, in cells, (A,) each.

    Moving one end of a bin stretches it about the other: a place moves by its distance from the end that stays.
    """
    length = axis.b - axis.a
    by_a, by_b = torch.zeros_like(length), torch.zeros_like(length)
    for share, middle, slope in _pieces(axis):
        by_a += slope * share * (axis.b - middle) / length
        by_b += slope * share * (middle - axis.a) / length
    # a = low (1 - p/P) + high p/P, b likewise with p + 1: the chain rule to the edges of the box.
    at_a = (axis.bin % bins).to(length.dtype) / bins
    at_b = at_a + 1 / bins
    return by_a * (1 - at_a) + by_b * (1 - at_b), by_a * at_a + by_b * at_b


def _ranges(count: Tensor) -> tuple[Tensor, Tensor]:
    """Expand counts: the owner of every element and the first element of every owner, int32 both."""
    ends = count.cumsum(0, dtype=torch.int32)
    total = int(ends[-1]) if len(ends) else 0
    return torch.repeat_interleave(count, output_size=total), ends - count


def _from(start: Tensor, owner: Tensor, offset: Tensor) -> Tensor:
    """Count up from each owner's ``start``; element ``i`` is the ``i - offset[owner[i]]``-th of its owner."""
    steps = torch.arange(len(owner), dtype=torch.int32, device=owner.device)
    return (start - offset).index_select(0, owner).add_(steps)


def _axis(low: Tensor, high: Tensor, size: Tensor, bins: int) -> _Axis:
    """Taps along one axis for boxes ``[low, high]`` (R,) in cells on maps of ``size`` (R,) cells."""
    fraction = torch.arange(bins + 1, dtype=low.dtype, device=low.device) / bins
    # Two-sided form: exact at both ends, so the last bin ends at the box's own edge.
    edges = low[:, None] * (1 - fraction) + high[:, None] * fraction  # (R, P + 1)
    a, b = edges[:, :-1], edges[:, 1:]
    # Clipped to the map while still floating point: a diverged box has no taps, not a wrapped integer.
    first = torch.minimum(a.floor().clamp(min=0), size[:, None])
    last = torch.minimum(b.ceil(), size[:, None] - 1)
    count = ((last - first + 1).clamp(min=0) * (b > a)).int().flatten()
    first = first.int().flatten()
    owner, start = _ranges(count)
    cell = _from(first, owner, start)
    a, b = (edge.flatten().index_select(0, owner) - cell for edge in (a, b))
    return _Axis(first, count, start, owner, cell, a, b)


def _taps(y: _Axis, x: _Axis, offset: Tensor, width: Tensor, bins: int) -> _Taps:
    """Outer product of the taps of two axes, bin by bin, built from runs of consecutive cells of one feature row."""

    def of_bins(axis: Tensor, dim: int) -> Tensor:
        """A value of each bin of one axis (R * P,) for each bin of the box (R * P * P,)."""
        grid = axis.view(-1, bins).unsqueeze(dim)
        return grid.expand(-1, bins, bins).reshape(-1)

    rows, cells = of_bins(y.cells, 2), of_bins(x.cells, 1)
    run_bin, run_start = _ranges(rows * (cells > 0))
    run_y = _from(of_bins(y.start, 2), run_bin, run_start)
    y_box = torch.div(y.bin, bins, rounding_mode="floor")
    row_start = (offset.index_select(0, y_box) + y.cell * width.index_select(0, y_box)).int()  # of the feature row
    run_row = row_start.index_select(0, run_y) + of_bins(x.first, 1).index_select(0, run_bin)
    run, tap_start = _ranges(cells.index_select(0, run_bin))
    tap_x = _from(of_bins(x.start, 1).index_select(0, run_bin), run, tap_start)
    size = rows * cells
    start = size.cumsum(0, dtype=torch.int32) - size
    return _Taps(_from(run_row, run, tap_start), start, size, tap_x, run, run_y, run_bin)


def _tap_weight(taps: _Taps, y: _Axis, x: _Axis, dtype: torch.dtype) -> Tensor:
    """The weight of every tap, (K,)."""
    return taps.of_x(_weight(x).to(dtype)).mul_(taps.of_y(_weight(y).to(dtype)))


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64


def _chunks(
    sizes: Tensor, offsets: Tensor, strides: Tensor, boxes: Tensor, map_index: Tensor, bins: int, shift: float
) -> Iterator[tuple[slice, _Axis, _Axis, _Taps]]:
    """Cut the boxes into pieces of bounded work; yield each with its axes, y and x, and their taps."""
    if len(map_index) and (int(map_index.min()) < 0 or int(map_index.max()) >= len(sizes)):
        raise IndexError(f"`map_index` must lie in [0, {len(sizes) - 1}].")
    map_index = map_index.long()
    height, width = sizes.index_select(0, map_index).unbind(1)
    offset = offsets.index_select(0, map_index)
    # A box that is not finite is pooled as an empty one here and overwritten with NaN by the caller.
    finite = torch.isfinite(boxes).all(1, keepdim=True)
    dtype = _work_dtype(boxes)
    cells = torch.where(finite, boxes, 0).to(dtype) / strides[map_index, None].to(dtype) - shift
    empty = ((cells[:, 2:] <= cells[:, :2]).any(1)) | ~finite[:, 0]
    cells = torch.where(empty[:, None], 0, cells)
    span = (cells[:, 2:] - cells[:, :2]).clamp(max=float(sizes.max()) if len(sizes) else 0) + 3 * bins
    piece = (span.prod(1).cumsum(0) / _CHUNK_TAPS).long()
    bounds = [0, *(torch.nonzero(piece.diff()).flatten() + 1).tolist(), len(boxes)]
    for begin, end in pairwise(bounds):
        part = slice(begin, end)
        x1, y1, x2, y2 = cells[part].unbind(1)
        y, x = _axis(y1, y2, height[part], bins), _axis(x1, x2, width[part], bins)
        yield part, y, x, _taps(y, x, offset[part], width[part], bins)


def _widened(table: Tensor) -> Tensor:
    """embedding_bag wants weights of the table's dtype: half features are widened rather than weights rounded."""
    return table.float() if table.dtype.itemsize < 4 else table


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
    features = _widened(table)
    out = features.new_empty(len(boxes), output_size, output_size, table.shape[1])
    for part, y, x, taps in _chunks(sizes, offsets, strides, boxes, map_index, output_size, shift):
        weight = _tap_weight(taps, y, x, features.dtype)
        bags = torch.embedding_bag(features, taps.row, taps.start, False, 0, False, weight)[0]
        out[part] = bags.view(-1, *out.shape[1:])
    out[~torch.isfinite(boxes).all(1)] = torch.nan
    return out.to(table.dtype)


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
    features, bins = _widened(table), grad.shape[1]
    out = torch.zeros_like(boxes)
    for part, y, x, taps in _chunks(sizes, offsets, strides, boxes, map_index, bins, shift):
        upstream = grad[part].reshape(-1, grad.shape[3]).to(features.dtype)
        # The inner product of each tap's feature row with its bin's gradient.
        inner = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            upstream, features, taps.row, taps.start, taps.run_bin.index_select(0, taps.run), 0
        )
        wy, wx = _weight(y).to(inner.dtype), _weight(x).to(inner.dtype)
        by_x = torch.zeros_like(wx).index_add_(0, taps.x, taps.of_y(wy).mul_(inner))
        by_run = inner.new_zeros(len(taps.run_y)).index_add_(0, taps.run, taps.of_x(wx).mul_(inner))
        by_y = torch.zeros_like(wy).index_add_(0, taps.run_y, by_run)
        out[part, 0::2], out[part, 1::2] = _to_edges(x, by_x, bins), _to_edges(y, by_y, bins)
    out /= strides[map_index.long(), None]
    out[~torch.isfinite(boxes).all(1)] = torch.nan
    return out


def _to_edges(axis: _Axis, by_weight: Tensor, bins: int) -> Tensor:
    """From the gradient to each weight of an axis (A,) to that to the low and high edge of each box, (R, 2) float64."""
    box = torch.div(axis.bin, bins, rounding_mode="floor")
    slopes = torch.stack(_slopes(axis, bins), 1).mul_(by_weight[:, None])
    return slopes.new_zeros(len(axis.cells) // bins, 2).index_add_(0, box, slopes)


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
    dtype = torch.float32 if table.dtype.itemsize < 4 else table.dtype
    out = torch.zeros_like(table, dtype=dtype)
    for part, y, x, taps in _chunks(sizes, offsets, strides, boxes, map_index, grad.shape[1], shift):
        upstream = grad[part].reshape(-1, grad.shape[3]).to(dtype)
        out += torch.ops.aten._embedding_bag_dense_backward(
            upstream,
            taps.row,
            taps.run_bin.index_select(0, taps.run),
            taps.size,
            taps.start,
            len(table),
            False,
            0,
            _tap_weight(taps, y, x, dtype),
            -1,
        )
    return out.to(table.dtype)
