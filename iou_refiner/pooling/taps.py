"""Which cells lie under which bins, and by what weight: the index building of the portable path.

Weights belong to an axis, not to a tap: they are computed once per (bin, cell) of each axis, in float64, and multiplied
where a row and a column meet. Nothing is padded to the widest box, and what has an entry for every tap is 32 bits wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from iou_refiner.pooling.inputs import PoolInputs

# At most so many taps are handled at once, which bounds the scratch memory to about 25 bytes for each of them, whatever
# the boxes. It is large because the result of a single piece need not be copied; most pieces turn out half as large.
_CHUNK_TAPS = 2_000_000


class Axes(NamedTuple):
    """The taps along single axes: 2 R lines of P bins, the columns (x) of all boxes and then the rows (y) of all."""

    first: Tensor  # (2 R P,) int32, first cell under each bin
    cells: Tensor  # (2 R P,) int32, cells under it
    start: Tensor  # (2 R P,) int32, where its taps start
    bin: Tensor  # (A,) int32, the bin each tap belongs to
    a: Tensor  # (A,) float64, edges of the bin, in cells from the tap's own
    b: Tensor  # (A,)


class Taps(NamedTuple):
    """Every (bin, cell) pair of a set of boxes, bin by bin, as embedding_bag wants them.

    A run is the taps of one bin in one feature row: neighbours in the table.
    """

    row: Tensor  # (K,) int32, row of the table
    start: Tensor  # (R P P,) int32, first tap of each bin
    size: Tensor  # (R P P,) int32, number of its taps
    x: Tensor  # (K,) int32, the tap along x
    run: Tensor  # (K,) int32, the run it belongs to
    run_start: Tensor  # (runs,) int32, first tap of each run
    run_y: Tensor  # (runs,) int32, its tap along y
    run_bin: Tensor  # (runs,) int32, the bin it belongs to

    def weights(self, of_axes: Tensor) -> Tensor:
        """The weight of every tap, (K,), from those of the taps along the axes, (A,)."""
        of_run = of_axes.index_select(0, self.run_y)
        return of_axes.index_select(0, self.x).mul_(of_run.index_select(0, self.run))

    def bin(self) -> Tensor:
        """The bin of every tap, (K,) int32."""
        return self.run_bin.index_select(0, self.run)


def _pieces(axes: Axes) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The two stretches of each bin over which the hat of the cell is linear: share of the bin, middle, slope."""
    length = axes.b - axes.a
    for low, high in ((-1, 0), (0, 1)):
        start, end = axes.a.clamp(low, high), axes.b.clamp(low, high)
        yield (end - start) / length, (start + end) / 2, -1 if low == 0 else 1


def weights(axes: Axes) -> Tensor:
    """Mean over the bin of the hat of each tap's cell, (A,): its value in the middle of each stretch, by their shares.

    Differences of the integral of the hat would give the same, but lose their digits in a bin of a millionth of a cell.
    """
    (left, low, _), (right, high, _) = _pieces(axes)
    return left * (1 + low) + right * (1 - high)


def slopes(axes: Axes, bins: int) -> tuple[Tensor, Tensor]:
    """Derivatives of the weights by the low and the high edge of the box, in cells, (A,) each.

    Moving one end of a bin stretches the bin about its other end: a point moves in proportion to its distance from the
    end that stays.
    """
    length = axes.b - axes.a
    by_a, by_b = torch.zeros_like(length), torch.zeros_like(length)
    for share, middle, slope in _pieces(axes):
        by_a += slope * share * (axes.b - middle) / length
        by_b += slope * share * (middle - axes.a) / length
    # a = low (1 - p/P) + high p/P, b likewise with p + 1: the chain rule to the edges of the box.
    at_a = (axes.bin % bins).to(length.dtype) / bins
    at_b = at_a + 1 / bins
    return by_a * (1 - at_a) + by_b * (1 - at_b), by_a * at_a + by_b * at_b


def _ranges(count: Tensor) -> tuple[Tensor, Tensor]:
    """Expand counts: the owner of every element and the first element of every owner, int32 both."""
    ends = count.cumsum(0, dtype=torch.int32)
    total = int(ends[-1]) if len(ends) else 0
    return torch.repeat_interleave(count, output_size=total), ends - count


def up_to(owner: Tensor) -> Tensor:
    """0, 1, 2, ... of the length of ``owner``, int32."""
    return torch.arange(len(owner), dtype=torch.int32, device=owner.device)


def _axes(low: Tensor, high: Tensor, size: Tensor, bins: int) -> Axes:
    """Taps along the axes of the boxes ``[low, high]`` (2, R) in cells, on maps of ``size`` (2, R) cells."""
    fraction = torch.arange(bins + 1, dtype=low.dtype, device=low.device) / bins
    # Two-sided form: exact at both ends, so the last bin ends at the box's own edge.
    edges = low[..., None] * (1 - fraction) + high[..., None] * fraction  # (2, R, P + 1)
    a, b = edges[..., :-1], edges[..., 1:]
    # Clipped to the map while still floating point: a diverged box has no taps, not a wrapped integer.
    first = torch.minimum(a.floor().clamp(min=0), size[..., None])
    last = torch.minimum(b.ceil(), size[..., None] - 1)
    count = ((last - first + 1).clamp(min=0) * (b > a)).int().flatten()
    first = first.int().flatten()
    owner, start = _ranges(count)
    cell = (first - start).index_select(0, owner).add_(up_to(owner))
    a, b = (edge.flatten().index_select(0, owner) - cell for edge in (a, b))
    return Axes(first, count, start, owner, a, b)


def _outer(axes: Axes, offset: Tensor, width: Tensor, bins: int) -> Taps:
    """Outer product of the taps of two axes, bin by bin, for maps from row ``offset`` (R,) on, ``width`` (R,) wide."""

    def along_x(values: Tensor) -> Tensor:
        """A value of each bin along x for each bin of the box, (R P P,)."""
        return values.view(2, -1, 1, bins)[0].expand(-1, bins, -1).reshape(-1)

    def along_y(values: Tensor) -> Tensor:
        return values.view(2, -1, bins, 1)[1].expand(-1, -1, bins).reshape(-1)

    cells, rows = along_x(axes.cells), along_y(axes.cells)
    size = cells * rows
    start = size.cumsum(0, dtype=torch.int32) - size
    run_bin, first_run = _ranges(rows)
    row_in_bin = up_to(run_bin) - first_run.index_select(0, run_bin)
    run_y = along_y(axes.start).index_select(0, run_bin).add_(row_in_bin)
    width = width.repeat_interleave(bins * bins)
    corner = offset.repeat_interleave(bins * bins) + along_y(axes.first) * width + along_x(axes.first)
    run_row = corner.int().index_select(0, run_bin) + row_in_bin * width.index_select(0, run_bin)
    run, run_start = _ranges(cells.index_select(0, run_bin))
    # Along a run both count up by one.
    steps = up_to(run)
    x = (along_x(axes.start).index_select(0, run_bin) - run_start).index_select(0, run).add_(steps)
    row = (run_row - run_start).index_select(0, run).add_(steps)
    return Taps(row, start, size, x, run, run_start, run_y, run_bin)


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64  # MPS has no float64


def chunks(inputs: PoolInputs, bins: int) -> Iterator[tuple[slice, Axes, Taps]]:
    """Cut the boxes into pieces of bounded work; yield each with its taps along single axes, and with all its taps.

    Raises:
        IndexError: a box is on a map that does not exist.
    """
    _, sizes, offsets, strides, boxes, map_index, shift = inputs
    if len(map_index) and (int(map_index.min()) < 0 or int(map_index.max()) >= len(sizes)):
        raise IndexError(f"`map_index` must lie in [0, {len(sizes) - 1}].")
    map_index = map_index.long()
    extent = sizes.index_select(0, map_index).t().flip(0)  # (2, R), width and height
    offset = offsets.index_select(0, map_index)
    # A box that is not finite is pooled as an empty one here and overwritten with NaN by the caller.
    finite = torch.isfinite(boxes).all(1)
    dtype = _work_dtype(boxes)
    cells = torch.where(finite[:, None], boxes, 0).to(dtype) / strides[map_index, None].to(dtype) - shift
    low, high = cells.t().reshape(2, 2, -1)  # (2, R) each, x and y
    full = (high > low).all(0) & finite
    low, high = torch.where(full, low, 0), torch.where(full, high, 0)
    span = (high - low).clamp(max=float(sizes.max()) if len(sizes) else 0) + 3 * bins
    piece = (span.prod(0).cumsum(0) / _CHUNK_TAPS).long()
    bounds = [0, *(torch.nonzero(piece.diff()).flatten() + 1).tolist(), len(boxes)]
    for begin, end in pairwise(bounds):
        part = slice(begin, end)
        axes = _axes(low[:, part], high[:, part], extent[:, part], bins)
        yield part, axes, _outer(axes, offset[part], extent[0, part], bins)
