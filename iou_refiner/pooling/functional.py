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

On CUDA tensors with CuPy the same contract is met by the kernels of :mod:`iou_refiner.pooling.cuda_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_refiner.checks import check_boxes, check_positive, check_same_device, check_vector
from iou_refiner.pooling.inputs import PoolInputs
from iou_refiner.pooling.operator import pool
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.structures import FeatureMaps


def prroi_pool(
    features: FeatureTable | FeatureMaps,
    boxes: Tensor,
    *,
    image_index: Tensor | None = None,
    level: Tensor | None = None,
    output_size: int = 7,
    aligned: bool = True,
) -> Tensor:
    """Pool boxes to ``output_size x output_size`` bins, each the exact mean of the interpolated features (eq. 3).

    Args:
        features: a prepared table, or feature maps of equal channels (then it is prepared on the spot).
        boxes: (R, 4) float xyxy in network pixels. Gradients flow to them, and to the features.
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
        IndexError: an image or level outside the table. The CUDA kernels pool such a box to NaN instead, since
            looking would stop the stream.
    """
    table = features if isinstance(features, FeatureTable) else FeatureTable.from_maps(features)
    check_boxes("boxes", boxes)
    check_positive("output_size", output_size)
    check_same_device("boxes", boxes, "features", table.cells)
    if level is None and table.num_levels > 1:
        raise ValueError(f"`level` must say from which of the {table.num_levels} levels each box is pooled.")
    map_index = first = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for name, index, count, step in (
        ("image_index", first if image_index is None else image_index, table.num_images, table.num_levels),
        ("level", first if level is None else level, table.num_levels, 1),
    ):
        _check_index(name, index, boxes, count)
        # A negative index must not alias another map: it leaves the range for good.
        map_index = map_index + torch.where((index >= 0) & (index < count), index.long() * step, len(table.sizes))
    boxes = boxes.float() if boxes.dtype.itemsize < 4 else boxes  # geometry is never half precision
    shift = 0.5 if aligned else 0.0
    inputs = PoolInputs(table.cells, table.sizes, table.offsets, table.strides, boxes, map_index.int(), shift)
    pooled: Tensor = pool(*inputs, output_size, boxes.requires_grad and torch.is_grad_enabled())[0]
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
