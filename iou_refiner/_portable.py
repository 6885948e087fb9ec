"""PrRoIPool by torch operators alone: the path of the CPU, of MPS, and of CUDA without CuPy.

The three functions at the end share their arguments with :mod:`iou_refiner.kernels`; the mathematics stands in
:mod:`iou_refiner.pooling`. All bins of all boxes are one ``embedding_bag`` over the rows of the table. Weights are
computed in float64 and stored in the dtype of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Taps handled at once: bounds the scratch memory whatever the boxes.
_CHUNK_TAPS = 4_000_000


class _Axis(NamedTuple):
    """The taps of every bin along one axis: so many ``cells`` from ``first``, zero-padded to T."""

    first: Tensor  # (R, P) int64
    cells: Tensor  # (R, P) int64
    weight: Tensor  # (R, P, T) float64
    d_low: Tensor  # (R, P, T) derivative of the weight by the low edge of the box, in cells
    d_high: Tensor  # (R, P, T) and by its high edge


class _Taps(NamedTuple):
    """Every (bin, cell) pair of a set of boxes, bin by bin, as embedding_bag wants them."""

    row: Tensor  # (K,) int32, row of the table
    weight: Tensor  # (K,) in the dtype of the sum
    bag: Tensor  # (K,) int32, bin the tap belongs to
    start: Tensor  # (R * P * P,) int32, first tap of each bin
    size: Tensor  # (R * P * P,) int32, number of its taps
    y: Tensor  # (K,) int64, position in the flattened (R, P, Ty) axis table
    x: Tensor  # (K,) int64, position in the flattened (R, P, Tx) axis table


def _hat(t: Tensor) -> Tensor:
    return (1 - t.abs()).clamp(min=0)


def _hat_integral(t: Tensor) -> Tensor:
    t = t.clamp(-1, 1)
    return t - t * t.abs() / 2


def _short_bin(a: Tensor, b: Tensor, length: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and its derivatives by ``a`` and ``b`` of a bin shorter than a cell.

    The general forms subtract near-equal numbers and lose the derivatives of a bin of a millionth of a cell. Within a
    short bin the hat changes its slope at most once, at ``knot``, and the same integrals are sums of slopes.
    """
    knot = b.floor()
    before = ((knot - a) / length).clamp(0, 1)  # share of the bin below the knot
    after = 1 - before
    rising, peak, falling = ((knot == cell + step).to(a.dtype) for step in (-1, 0, 1))
    slope_before, slope_after = peak - falling, rising - peak
    d_a = slope_before * before * (before / 2 + after) + slope_after * after * after / 2
    d_b = slope_after * after * (after / 2 + before) + slope_before * before * before / 2
    return _hat(a - cell) + length * d_a, d_a, d_b


def _axis(low: Tensor, high: Tensor, size: Tensor, bins: int) -> _Axis:
    """Weights along one axis for boxes ``[low, high]`` (R,) in cells on maps of ``size`` (R,) cells."""
    fraction = torch.arange(bins + 1, dtype=low.dtype, device=low.device) / bins
    # Two-sided form: exact at both ends, so the last bin ends at the box's own edge.
    edges = low[:, None] * (1 - fraction) + high[:, None] * fraction  # (R, P + 1)
    a, b = edges[:, :-1], edges[:, 1:]
    # Clipped to the map while still floating point: a diverged box has no taps, not a wrapped integer.
    first = torch.minimum(a.floor().clamp(min=0), size[:, None])
    last = torch.minimum(b.ceil(), size[:, None] - 1)
    count = ((last - first + 1).clamp(min=0) * (b > a)).long()  # (R, P)
    width = int(count.max()) if count.numel() else 0
    step = torch.arange(width, device=low.device)
    cell = first[..., None] + step  # (R, P, T)
    used = step < count[..., None]
    length = torch.where(b > a, b - a, 1.0)[..., None]
    a, b = a[..., None], b[..., None]
    weight = (_hat_integral(b - cell) - _hat_integral(a - cell)) / length
    d_a, d_b = (weight - _hat(a - cell)) / length, (_hat(b - cell) - weight) / length
    short = length < 0.5
    exact = _short_bin(a, b, length, cell)
    weight, d_a, d_b = (torch.where(short, one, other) for one, other in zip(exact, (weight, d_a, d_b), strict=True))
    # a = low (1 - p/P) + high p/P, b likewise with p + 1: the chain rule to the edges of the box.
    at_a, at_b = fraction[:-1, None], fraction[1:, None]
    d_low = d_a * (1 - at_a) + d_b * (1 - at_b)
    d_high = d_a * at_a + d_b * at_b
    return _Axis(first.long(), count, *(torch.where(used, values, 0.0) for values in (weight, d_low, d_high)))


def _ranges(count: Tensor) -> tuple[Tensor, Tensor, int]:
    """Expand counts: the owner of every element, the first element of every owner, and the total."""
    total = int(count.sum())
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count, output_size=total)
    return owner, count.cumsum(0) - count, total


def _taps(y: _Axis, x: _Axis, offset: Tensor, width: Tensor, dtype: torch.dtype) -> _Taps:
    """Outer product of the taps of two axes, bin by bin, built from runs of consecutive cells of one feature row."""
    boxes, bins = y.cells.shape
    rows_per_bin = y.cells[:, :, None].expand(-1, -1, bins).reshape(-1)  # (R * P * P,)
    cells_per_row = x.cells[:, None, :].expand(-1, bins, -1).reshape(-1)
    index = torch.arange(boxes * bins, device=offset.device).view(boxes, bins)
    y_table = (index * y.weight.shape[2])[:, :, None].expand(-1, -1, bins).reshape(-1)
    x_table = (index * x.weight.shape[2])[:, None, :].expand(-1, bins, -1).reshape(-1)
    first_row = offset[:, None, None] + y.first[:, :, None] * width[:, None, None] + x.first[:, None, :]
    run_bag, run_start, _ = _ranges(rows_per_bin * (cells_per_row > 0))  # one run = one feature row under one bin
    ky = torch.arange(len(run_bag), device=offset.device) - run_start.index_select(0, run_bag)
    run_width = width[:, None].expand(-1, bins * bins).reshape(-1).index_select(0, run_bag)
    run_row = first_row.reshape(-1).index_select(0, run_bag) + ky * run_width
    run_y = y_table.index_select(0, run_bag) + ky
    run_wy = y.weight.reshape(-1).index_select(0, run_y)
    run, tap_start, total = _ranges(cells_per_row.index_select(0, run_bag))
    tap = torch.arange(total, device=offset.device)
    x_index = (x_table.index_select(0, run_bag) - tap_start).index_select(0, run) + tap
    weight = run_wy.index_select(0, run) * x.weight.reshape(-1).index_select(0, x_index)
    size = rows_per_bin * cells_per_row
    return _Taps(
        row=((run_row - tap_start).index_select(0, run) + tap).int(),
        weight=weight.to(dtype),
        bag=run_bag.index_select(0, run).int(),
        start=(size.cumsum(0) - size).int(),
        size=size.int(),
        y=run_y.index_select(0, run),
        x=x_index,
    )


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64


def _chunks(
    sizes: Tensor, offsets: Tensor, strides: Tensor, boxes: Tensor, map_index: Tensor, bins: int, shift: float
) -> Iterator[tuple[slice, _Axis, _Axis, Tensor, Tensor]]:
    """Cut the boxes into pieces of bounded work; yield each with its axes, row offsets and map widths."""
    if len(map_index) and (int(map_index.min()) < 0 or int(map_index.max()) >= len(sizes)):
        raise IndexError(f"`map_index` must lie in [0, {len(sizes) - 1}].")
    map_index = map_index.long()
    height, width = sizes.long()[map_index].unbind(1)
    # A box that is not finite is pooled as an empty one here and overwritten with NaN by the caller.
    finite = torch.isfinite(boxes).all(1, keepdim=True)
    dtype = _work_dtype(boxes)
    cells = torch.where(finite, boxes, 0).to(dtype) / strides[map_index, None].to(dtype) - shift
    empty = ((cells[:, 2:] <= cells[:, :2]).any(1)) | ~finite[:, 0]
    cells = torch.where(empty[:, None], 0, cells)
    span = (cells[:, 2:] - cells[:, :2]).clamp(max=float(sizes.max()) if len(sizes) else 0) + 3 * bins
    work = span.prod(1).cumsum(0)
    piece = (work / _CHUNK_TAPS).long()
    bounds = [0, *(torch.nonzero(piece.diff()).flatten() + 1).tolist(), len(boxes)]
    for begin, end in pairwise(bounds):
        part = slice(begin, end)
        x1, y1, x2, y2 = cells[part].unbind(1)
        y = _axis(y1, y2, height[part], bins)
        x = _axis(x1, x2, width[part], bins)
        yield part, y, x, offsets[map_index[part]], width[part]


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
    # embedding_bag wants weights of the table's dtype: half features are widened rather than weights rounded.
    features = table.float() if table.dtype.itemsize < 4 else table
    out = features.new_zeros(len(boxes), output_size, output_size, table.shape[1])
    for part, y, x, offset, width in _chunks(sizes, offsets, strides, boxes, map_index, output_size, shift):
        taps = _taps(y, x, offset, width, features.dtype)
        bags = torch.embedding_bag(features, taps.row, taps.start, False, 0, False, taps.weight)[0]
        out[part] = bags.view(-1, output_size, output_size, table.shape[1])
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
    features = table.float() if table.dtype.itemsize < 4 else table
    out = torch.zeros_like(boxes)
    for part, y, x, offset, width in _chunks(sizes, offsets, strides, boxes, map_index, grad.shape[1], shift):
        taps = _taps(y, x, offset, width, features.dtype)
        bags = grad[part].reshape(-1, grad.shape[3]).to(features.dtype)
        # The inner product of each tap's feature row with its bin's gradient.
        inner = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            bags, features, taps.row, taps.start, taps.bag, 0
        )
        wy, wx = y.weight.reshape(-1), x.weight.reshape(-1)
        by_y = torch.zeros_like(wy).index_add_(0, taps.y, inner * wx.index_select(0, taps.x)).view_as(y.weight)
        by_x = torch.zeros_like(wx).index_add_(0, taps.x, inner * wy.index_select(0, taps.y)).view_as(x.weight)
        gradient = [by_x * x.d_low, by_y * y.d_low, by_x * x.d_high, by_y * y.d_high]
        out[part] = torch.stack([g.sum((1, 2)) for g in gradient], 1).to(out.dtype)
    out /= strides[map_index.long(), None]
    out[~torch.isfinite(boxes).all(1)] = torch.nan
    return out


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
    for part, y, x, offset, width in _chunks(sizes, offsets, strides, boxes, map_index, grad.shape[1], shift):
        taps = _taps(y, x, offset, width, dtype)
        bags = grad[part].reshape(-1, grad.shape[3]).to(dtype)
        out += torch.ops.aten._embedding_bag_dense_backward(
            bags, taps.row, taps.bag, taps.size, taps.start, len(table), False, 0, taps.weight, -1
        )
    return out.to(table.dtype)
