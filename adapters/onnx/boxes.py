"""What an exported detector returns, as boxes in pixels of the network input, scores and labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from iou_refiner import DataError
from iou_refiner.adapters.onnx.layouts import OnnxLayout

_YOLOX_STRIDES = (8, 16, 32)


def read_boxes(
    tensors: Mapping[str, Tensor], boxes: str, layout: OnnxLayout, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """All boxes of one image.

    Args:
        tensors: what the graph returned, by name.
        boxes: the tensor of boxes.
        layout: what the tensors mean.
        size: ``(height, width)`` of the network input.

    Returns:
        Boxes (N, 4) float32 xyxy in pixels of the network input, neither clipped nor sifted; scores (N, K) float32;
        labels (N, K) int64 of those scores. K is the number of classes, or 1 where each box has its own label.

    Raises:
        DataError: the shape of a tensor is not what the layout says.
    """
    rows = _matrix(tensors, boxes, layout, columns=5 if layout.scores is None else 4)
    if layout.labels is None:
        logits = rows[:, 4:] if layout.scores is None else _matrix(tensors, layout.scores, layout, columns=1)
        scores = _probabilities(logits, layout)
        labels = torch.arange(scores.shape[1]).expand_as(scores)
    else:
        logits = rows[:, 4:5] if layout.scores is None else tensors[layout.scores].reshape(-1, 1).float()
        scores = _probabilities(logits, layout)
        labels = (rows[:, -1:] if layout.labels == boxes else tensors[layout.labels].reshape(-1, 1)).long()
    if not len(rows) == len(scores) == len(labels) or scores.shape[1] == 0:
        raise _misfit(tensors, f"{len(rows)} boxes, scores {tuple(scores.shape)}, {len(labels)} labels")
    corners = _corners(_from_cells(rows[:, :4], tensors, size) if layout.box_format == "yolox" else rows[:, :4], layout)
    return corners * corners.new_tensor(size[::-1] * 2) if layout.normalized else corners, scores, labels


def _matrix(tensors: Mapping[str, Tensor], name: str, layout: OnnxLayout, *, columns: int) -> Tensor:
    """The tensor ``name`` as float (N, columns), of at least so many columns."""
    values = tensors[name]
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim == 2 and layout.transposed:
        values = values.T
    if values.ndim != 2 or values.shape[1] < columns:
        order = f"(1, {columns} or more, N)" if layout.transposed else f"(1, N, {columns} or more)"
        raise _misfit(tensors, f"{name!r} is not {order}")
    return values.float()


def _probabilities(logits: Tensor, layout: OnnxLayout) -> Tensor:
    """Scores (N, classes) from what the graph returns in their place."""
    if layout.activation == "softmax":
        return logits.softmax(1)[:, :-1]
    scores = logits.sigmoid() if layout.activation == "sigmoid" else logits
    return scores[:, :1] * scores[:, 1:] if layout.objectness else scores


def _corners(boxes: Tensor, layout: OnnxLayout) -> Tensor:
    """Boxes (N, 4) of the layout's format as xyxy."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if layout.box_format == "xyxy":
        return boxes
    if layout.box_format == "xywh":
        return torch.cat([first, first + second], 1)
    return torch.cat([first - second / 2, first + second / 2], 1)


def _from_cells(rows: Tensor, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """YOLOX's (x, y offset, log width, log height in cells), level by level, as cxcywh in pixels; both (N, 4)."""
    grids = [(size[0] // stride, size[1] // stride, stride) for stride in _YOLOX_STRIDES]
    cells = sum(height * width for height, width, _ in grids)
    if len(rows) != cells:
        raise _misfit(tensors, f"an input of {size[0]} x {size[1]} has {cells} cells of stride 8, 16 and 32")
    corner = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1) * s for h, w, s in grids])
    stride = torch.cat([torch.full((h * w, 1), float(s)) for h, w, s in grids])  # (N, 1); corner: (N, 2), x and y
    return torch.cat([corner + rows[:, :2] * stride, rows[:, 2:].exp() * stride], 1)


def _misfit(tensors: Mapping[str, Tensor], why: str) -> DataError:
    shapes = ", ".join(f"{name!r} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return DataError(f"The graph does not return what its layout says: {why}; it returns {shapes}. Check the layout.")
