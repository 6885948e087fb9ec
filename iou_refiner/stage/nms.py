"""IoU-guided NMS (Jiang et al., ECCV 2018, Algorithm 1) and greedy NMS.

In each cluster of overlapping boxes of one class, greedy NMS keeps the box with the highest class score. IoU-guided NMS
keeps the box that is predicted to fit best and gives it the highest class score of the cluster: localization chooses
the box, classification the order of the clusters.

Memory is O(N), and time grows with the boxes that survive (:mod:`iou_refiner.stage.greedy_numpy`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_refiner.checks import (
    check_boxes,
    check_fraction,
    check_same_device,
    check_vector,
)
from iou_refiner.stage import greedy_numpy, greedy_torch


def iou_guided_nms(
    boxes: Tensor, scores: Tensor, ranking: Tensor, labels: Tensor | None = None, *, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Keep the best-fitting box of every cluster, with the cluster's highest class score (Algorithm 1).

    Args:
        boxes: (N, 4) float xyxy.
        scores: (N,) float class scores.
        ranking: (N,) float, what ranks the boxes: the predicted IoU (the paper's), or a fusion of it with the score.
        labels: (N,) integer classes; boxes of different classes never suppress each other. Default: one class.
        threshold: a box is suppressed by a better-ranked kept box that overlaps it by *more* than this IoU.

    Returns:
        ``keep`` (K,) int64, indices of the kept boxes by falling rank, and ``merged`` (K,), the highest class score of
        each cluster. Ties in rank go to the higher score, then to the smaller index, so the result is deterministic.

    Raises:
        ValueError: shapes or devices disagree, the threshold is outside [0, 1], or a score or rank is NaN.
    """
    labels = check_nms(boxes, scores, labels, threshold)
    check_vector("ranking", ranking, len(boxes), like="boxes")
    _check_rankable("ranking", ranking)
    order = falling_order(ranking, scores)
    owner, keep = _suppress(boxes, labels, order, threshold)
    merged = torch.full_like(scores, -torch.inf).scatter_reduce_(0, owner, scores.index_select(0, order), "amax")
    return order.index_select(0, keep), merged.index_select(0, keep)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, *, threshold: float = 0.5) -> Tensor:
    """Greedy NMS per class: indices (K,) of the kept boxes by falling score. Arguments as :func:`iou_guided_nms`."""
    labels = check_nms(boxes, scores, labels, threshold)
    order = falling_order(scores, scores)
    return order.index_select(0, _suppress(boxes, labels, order, threshold)[1])


def check_nms(boxes: Tensor, scores: Tensor, labels: Tensor | None, threshold: float) -> Tensor:
    """Check the arguments that every NMS has; return the labels, all 0 where none are given."""
    check_boxes("boxes", boxes)
    check_vector("scores", scores, len(boxes), like="boxes")
    check_same_device("scores", scores, "boxes", boxes)
    _check_rankable("scores", scores)
    check_fraction("threshold", threshold)
    if labels is None:
        return torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    check_vector("labels", labels, len(boxes), like="boxes")
    return labels


def _check_rankable(name: str, values: Tensor) -> None:
    if bool(torch.isnan(values).any()):
        raise ValueError(f"`{name}` holds NaN, which cannot be ranked. Replace it first, for example with 0.")


def falling_order(rank: Tensor, scores: Tensor) -> Tensor:
    """Indices (N,) by falling rank; ties by falling score, then by index."""
    if rank.device.type != "cpu":
        return greedy_torch.order(rank, scores)
    return torch.from_numpy(greedy_numpy.order(*(values.detach().double().numpy() for values in (rank, scores))))


def _suppress(boxes: Tensor, labels: Tensor, order: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """For boxes in their ``order``: the kept box that owns each (N,), and which are kept (K,)."""
    boxes, labels = boxes.detach().index_select(0, order), labels.index_select(0, order)
    if boxes.device.type == "cpu":
        owner = torch.from_numpy(greedy_numpy.owners(boxes.double().numpy(), labels.long().numpy(), threshold))
    else:
        owner = greedy_torch.owners(boxes, labels, threshold)
    return owner, torch.nonzero(owner == torch.arange(len(owner), device=owner.device)).flatten()
