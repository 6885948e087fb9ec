"""Precise RoI Pooling: the exact average of the bilinear interpolant over each bin, differentiable in the box.

Source: Jiang et al., "Acquisition of Localization Confidence for Accurate Object Detection", ECCV 2018, eqs. 2 to 4.

The interpolant of a map ``F`` is ``f(x, y) = sum_ij hat(x - i) hat(y - j) F[j, i]`` with ``hat(t) = max(0, 1 - |t|)``;
it is 0 more than one cell outside the map. A bin ``[a, b] x [c, d]`` pools to the mean of ``f`` over it. The mean
separates: ``pooled = wy' F wx`` with

    w_k = (H(b - k) - H(a - k)) / (b - a),     H(t) = integral of hat = t - t |t| / 2, t clamped to [-1, 1],

so a bin is one weighted sum of the few feature rows under it. That is what ``embedding_bag`` computes, for all bins of
all boxes on all levels of all images in a single call, from a channels-last table made once per image. The gradient to
the box is the same sum with the derivative weights

    dw_k/da = (w_k - hat(a - k)) / (b - a),     dw_k/db = (hat(b - k) - w_k) / (b - a),

which are exact also where an edge lies on an integer (differentiating through min, max or clamp is not). Weights are
computed in float64 and stored in the dtype of the table; for bins shorter than a cell, in a form that does not cancel.

On CUDA tensors with CuPy the same contract is met by the kernels of :mod:`iou_refiner.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iou_refiner import kernels
from iou_refiner._checks import check_boxes, check_positive, check_same_device, check_vector
from iou_refiner.data import FeatureMaps

# Taps handled at once by the portable path: bounds its scratch memory to about 100 MB whatever the boxes.
_CHUNK_TAPS = 4_000_000


@dataclass(frozen=True, eq=False)
class FeaturePyramid:
    """All feature maps of a batch as one channels-last table: encode once, pool any boxes from it.

    Map ``image * num_levels + level`` of ``H x W`` cells is ``H * W`` consecutive rows of the table, row by row.

    Args:
        table: (rows, C) features, contiguous.
        sizes: (M, 2) int32, height and width of each map, M = images * levels.
        offsets: (M,) int64, first row of each map.
        strides: (M,) float32, pixels of the network input per cell.
        num_levels: levels per image.
    """

    table: Tensor
    sizes: Tensor
    offsets: Tensor
    strides: Tensor
    num_levels: int

    @classmethod
    def from_maps(cls, features: FeatureMaps) -> FeaturePyramid:
        """Lay out feature maps as a table; one copy, differentiable. All levels must have the same channels.

        Raises:
            ValueError: levels differ in their number of channels.
        """
        if len(set(features.channels)) != 1:
            raise ValueError(
                f"A pyramid needs the same channels on every level, got {features.channels}. "
                "Project the levels to one width first, as IoUPredictor.encode does."
            )
        grad, device = torch.is_grad_enabled(), features.device
        # Tensors made in inference mode could never take part in an ascent, which runs outside of it.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            maps = [level[image] for image in range(len(features)) for level in features.levels]
            sizes = torch.tensor([(m.shape[1], m.shape[2]) for m in maps], dtype=torch.int32).reshape(-1, 2)
            areas = sizes.long().prod(1)
            empty = features.levels[0].new_zeros(0, features.channels[0])
            table = torch.cat([m.flatten(1).t() for m in maps]) if maps else empty
            strides = torch.tensor(features.strides * len(features), dtype=torch.float32)
            offsets = areas.cumsum(0) - areas
            return cls(table, sizes.to(device), offsets.to(device), strides.to(device), len(features.strides))

    @classmethod
    def concat(cls, parts: Sequence[FeaturePyramid]) -> FeaturePyramid:
        """The images of several pyramids in one. Their maps may differ in size: each keeps its own."""
        if len({part.num_levels for part in parts}) != 1:
            raise ValueError(f"Pyramids must have equally many levels, got {[part.num_levels for part in parts]}.")
        rows = torch.tensor([0, *(len(part.table) for part in parts[:-1])]).cumsum(0).tolist()
        return cls(
            torch.cat([part.table for part in parts]),
            torch.cat([part.sizes for part in parts]),
            torch.cat([part.offsets + start for part, start in zip(parts, rows, strict=True)]),
            torch.cat([part.strides for part in parts]),
            parts[0].num_levels,
        )

    @property
    def num_images(self) -> int:
        """Images in the table."""
        return len(self.sizes) // self.num_levels


def prroi_pool(
    features: FeaturePyramid | FeatureMaps,
    boxes: Tensor,
    *,
    image_index: Tensor | None = None,
    level: Tensor | None = None,
    output_size: int = 7,
    aligned: bool = True,
) -> Tensor:
    """Pool boxes to ``output_size x output_size`` bins, each the exact mean of the interpolated features (eq. 3).

    Args:
        features: a prepared pyramid, or feature maps of equal channels (then it is prepared on the spot).
        boxes: (R, 4) float xyxy, pixels of the network input. Gradients flow to them, and to the features.
        image_index: (R,) integer, image of each box; default all 0.
        level: (R,) integer, level each box is pooled from; may be left out where there is one level.
        output_size: bins per side.
        aligned: cell ``i`` is centred at ``(i + 0.5) * stride``; False puts it at ``i * stride``, as the original
            PrRoIPool does.

    Returns:
        (R, C, output_size, output_size) in channels-last memory. An empty or inverted box pools to 0 with gradient 0;
        a box with a coordinate that is not finite pools to NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree.
        IndexError: an image or level outside the pyramid (checked on CPU; on CUDA such a box pools to NaN, since
            looking would stop the stream).
    """
    pyramid = features if isinstance(features, FeaturePyramid) else FeaturePyramid.from_maps(features)
    check_boxes("boxes", boxes)
    check_positive("output_size", output_size)
    check_same_device("boxes", boxes, "features", pyramid.table)
    if level is None and pyramid.num_levels > 1:
        raise ValueError(f"`level` must say from which of the {pyramid.num_levels} levels each box is pooled.")
    map_index = first = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for name, index, count, step in (
        ("image_index", first if image_index is None else image_index, pyramid.num_images, pyramid.num_levels),
        ("level", first if level is None else level, pyramid.num_levels, 1),
    ):
        _check_index(name, index, boxes, count)
        # A negative index must not alias another map: it leaves the range for good.
        map_index = map_index + torch.where((index >= 0) & (index < count), index.long() * step, len(pyramid.sizes))
    pooled: Tensor = _pool(
        pyramid.table,
        pyramid.sizes,
        pyramid.offsets,
        pyramid.strides,
        boxes.float() if boxes.dtype.itemsize < 4 else boxes,  # geometry is never half precision
        map_index.int(),
        output_size,
        0.5 if aligned else 0.0,
    )
    return pooled.permute(0, 3, 1, 2)


def assign_levels(boxes: Tensor, strides: tuple[float, ...], *, canonical_cells: float = 14.0) -> Tensor:
    """The level each box belongs to by the rule of FPN (Lin et al. 2017, eq. 1): a 224 px box goes to stride 16.

    Args:
        boxes: (N, 4) xyxy in network pixels.
        strides: pixels per cell of each level, finest first.
        canonical_cells: side of a box, in cells, from which on it belongs to a level.

    Returns:
        (N,) int64. Empty boxes go to the finest level.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).sqrt().contiguous()
    lower_bounds = boxes.new_tensor([stride * canonical_cells for stride in strides[1:]])
    return torch.bucketize(side.detach(), lower_bounds, right=True)


def _check_index(name: str, index: Tensor, boxes: Tensor, count: int) -> None:
    check_vector(name, index, len(boxes), like="boxes")
    check_same_device(name, index, "boxes", boxes)
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"`{name}` must be integer, got {index.dtype}. Convert with .long().")
    if index.device.type != "cpu" or torch.compiler.is_compiling() or not len(index):
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= count:
        raise IndexError(f"`{name}` must lie in [0, {count - 1}], got values from {low} to {high}.")


# ---- The operator: one schema for every backend, known to torch.compile, autograd and opcheck. ----


def _backend(table: Tensor) -> Any:
    fit = kernels.is_available(table.device) and table.dtype in kernels.DTYPES
    return kernels if fit else _Portable


@torch.library.custom_op("iou_refiner::prroi_pool", mutates_args=())
def _pool(
    table: Tensor,
    sizes: Tensor,
    offsets: Tensor,
    strides: Tensor,
    boxes: Tensor,
    map_index: Tensor,
    output_size: int,
    shift: float,
) -> Tensor:
    out: Tensor = _backend(table).forward(table, sizes, offsets, strides, boxes, map_index, output_size, shift)
    return out


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
) -> Tensor:
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


@_pool.register_fake
def _(table, sizes, offsets, strides, boxes, map_index, output_size, shift):  # type: ignore[no-untyped-def]
    return table.new_empty(boxes.shape[0], output_size, output_size, table.shape[1])


@_grad_boxes.register_fake
def _(grad, table, sizes, offsets, strides, boxes, map_index, shift):  # type: ignore[no-untyped-def]
    return torch.empty_like(boxes)


@_grad_table.register_fake
def _(grad, table, sizes, offsets, strides, boxes, map_index, shift):  # type: ignore[no-untyped-def]
    return torch.empty_like(table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.shift = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, grad = ctx.saved_tensors, grad.contiguous()
    grad_table = _grad_table(grad, *tensors, ctx.shift) if ctx.needs_input_grad[0] else None
    grad_boxes = _grad_boxes(grad, *tensors, ctx.shift) if ctx.needs_input_grad[4] else None
    return grad_table, None, None, None, grad_boxes, None, None, None


_pool.register_autograd(_backward, setup_context=_save)


# ---- The portable path. ----


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


class _Portable:
    """Torch operators only: CPU, MPS, and CUDA without CuPy. Same functions as :mod:`iou_refiner.kernels`."""

    @staticmethod
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
        # embedding_bag wants weights of the table's dtype: half features are widened rather than weights rounded.
        features = table.float() if table.dtype.itemsize < 4 else table
        out = features.new_zeros(len(boxes), output_size, output_size, table.shape[1])
        for part, y, x, offset, width in _chunks(sizes, offsets, strides, boxes, map_index, output_size, shift):
            taps = _taps(y, x, offset, width, features.dtype)
            bags = torch.embedding_bag(features, taps.row, taps.start, False, 0, False, taps.weight)[0]
            out[part] = bags.view(-1, output_size, output_size, table.shape[1])
        out[~torch.isfinite(boxes).all(1)] = torch.nan
        return out.to(table.dtype)

    @staticmethod
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

    @staticmethod
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
        dtype = torch.float32 if table.dtype.itemsize < 4 else table.dtype
        out = torch.zeros_like(table, dtype=dtype)
        for part, y, x, offset, width in _chunks(sizes, offsets, strides, boxes, map_index, grad.shape[1], shift):
            taps = _taps(y, x, offset, width, dtype)
            bags = grad[part].reshape(-1, grad.shape[3]).to(dtype)
            out += torch.ops.aten._embedding_bag_dense_backward(
                bags, taps.row, taps.bag, taps.size, taps.start, len(table), False, 0, taps.weight, -1
            )
        return out.to(table.dtype)
