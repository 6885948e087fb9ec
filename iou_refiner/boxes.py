"""Pure functions on boxes.

One convention throughout the core: floating point ``(x1, y1, x2, y2)`` in continuous pixels of the network input,
half open (``width = x2 - x1``, no ``+ 1``), origin at the top left corner. The core runs where torchvision is not
installed (an exported detector needs none), hence the few lines of area, IoU and clipping here.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A box may shrink or grow by this factor in one decoding; keeps exp() finite for any finite step.
MAX_LOG_SCALE = 4.0
#: Standard deviations of what regression has to predict (shifts, then log sizes): deltas are learned in these units, as
#: in every R-CNN.
DELTA_STDS = (0.1, 0.1, 0.2, 0.2)


def box_area(boxes: Tensor) -> Tensor:
    """Area of each box, (N,); 0 for empty and inverted boxes. ``boxes``: (N, 4) xyxy."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of row ``i`` of ``a`` with row ``i`` of ``b``: two (N, 4) xyxy to (N,) in [0, 1]. Empty boxes give 0."""
    return _iou(a.unbind(1), b.unbind(1), box_area(a), box_area(b))


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every row of ``a`` with every row of ``b``: (N, 4), (M, 4) xyxy to (N, M) in [0, 1]."""
    return _iou(a[:, None].unbind(2), b[None].unbind(2), box_area(a)[:, None], box_area(b)[None])


def _iou(a: tuple[Tensor, ...], b: tuple[Tensor, ...], area_a: Tensor, area_b: Tensor) -> Tensor:
    """IoU from the four coordinates of boxes and their areas, whatever shapes broadcast."""
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    intersection = width * height
    union = area_a + area_b - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes cut to ``image_size = (height, width)``; a new (N, 4) tensor."""
    height, width = image_size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def valid_boxes(boxes: Tensor) -> Tensor:
    """Mask (N,) of the boxes that are finite and have positive width and height."""
    return torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)


def encode_boxes(boxes: Tensor, reference: Tensor) -> Tensor:
    """Deltas of boxes relative to ``reference``: ``((cx - cx') / w', (cy - cy') / h', log(w / w'), log(h / h'))``.

    Law: ``decode_boxes(encode_boxes(b, a), a) == b`` for valid boxes (up to rounding, and up to the
    :data:`MAX_LOG_SCALE` clamp). Both arguments (N, 4) xyxy, result (N, 4).
    """
    size, reference_size = boxes[:, 2:] - boxes[:, :2], reference[:, 2:] - reference[:, :2]
    shift = ((boxes[:, :2] + boxes[:, 2:]) - (reference[:, :2] + reference[:, 2:])) / (2 * reference_size)
    return torch.cat([shift, (size / reference_size).log()], 1)


def decode_boxes(deltas: Tensor, reference: Tensor) -> Tensor:
    """Inverse of :func:`encode_boxes`: (N, 4) deltas to (N, 4) xyxy. Zeros give the same bits."""
    reference_size = reference[:, 2:] - reference[:, :2]
    shift = deltas[:, :2] * reference_size
    growth = reference_size * deltas[:, 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).expm1() / 2
    return torch.cat([reference[:, :2] + shift - growth, reference[:, 2:] + shift + growth], 1)
