"""IoU-guided NMS (Jiang et al., ECCV 2018, Algorithm 1), and the baselines it is judged against.

In each cluster of overlapping boxes of one class, greedy NMS keeps the box the classifier likes best. IoU-guided NMS
keeps the box that is predicted to fit best and gives it the highest class score of the cluster, so localisation chooses
the box while classification keeps the ranking between clusters.

Memory is O(N), and the time goes with the boxes that survive (:mod:`iou_refiner.stage.greedy_numpy`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from iou_refiner.checks import (
    check_boxes,
    check_choice,
    check_fraction,
    check_positive,
    check_same_device,
    check_vector,
)
from iou_refiner.stage import greedy_numpy, greedy_torch
from iou_refiner.stage.soft_nms import FloatArray, decayed


def iou_guided_nms(
    boxes: Tensor, scores: Tensor, ious: Tensor, labels: Tensor | None = None, *, threshold: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Keep the best-fitting box of every cluster, with the cluster's highest class score (Algorithm 1).

    Args:
        boxes: (N, 4) float xyxy, any one frame.
        scores: (N,) float class scores.
        ious: (N,) float, what ranks the boxes: predicted IoU, or any fusion of it with the score.
        labels: (N,) integer classes; boxes of different classes never meet. Default: one class.
        threshold: a box is suppressed by a better-ranked kept box that overlaps it by *more* than this IoU.

    Returns:
        ``keep`` (K,) int64, indices of the kept boxes by falling rank, and ``merged`` (K,), the class score each takes
        over. Ties in rank go to the higher score, then to the smaller index, so the result is deterministic.

    Raises:
        ValueError: shapes or devices disagree, the threshold is outside [0, 1], or a score or rank is NaN.
    """
    labels = _check(boxes, scores, labels, threshold)
    check_vector("ious", ious, len(boxes), like="boxes")
    _check_rankable("ious", ious)
    order = _order(ious, scores)
    owner, kept = _suppress(boxes, labels, order, threshold)
    merged = torch.full_like(scores, -torch.inf).scatter_reduce_(0, owner, scores.index_select(0, order), "amax")
    return order.index_select(0, kept), merged.index_select(0, kept)


def nms(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, *, threshold: float = 0.5) -> Tensor:
    """Greedy NMS per class: indices (K,) of the kept boxes by falling score. Arguments as :func:`iou_guided_nms`."""
    labels = _check(boxes, scores, labels, threshold)
    order = _order(scores, scores)
    return order.index_select(0, _suppress(boxes, labels, order, threshold)[1])


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    threshold: float = 0.5,
    min_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (Bodla et al., ICCV 2017): overlapping boxes lose score instead of being removed.

    Args:
        boxes, scores, labels: as in :func:`iou_guided_nms`.
        method: ``"gaussian"`` multiplies by ``exp(-IoU^2 / sigma)``, ``"linear"`` by ``1 - IoU`` above ``threshold``.
        sigma: width of the Gaussian.
        threshold: IoU above which the linear method acts.
        min_score: boxes whose score falls below it are dropped.

    Returns:
        ``keep`` (K,) int64 by falling new score, and the new scores (K,).
    """
    labels = _check(boxes, scores, labels, threshold)
    check_choice("method", method, ["gaussian", "linear"])
    check_positive("sigma", sigma)

    def decay(iou: FloatArray) -> FloatArray:
        return np.exp(-(iou**2) / sigma) if method == "gaussian" else np.where(iou > threshold, 1 - iou, 1.0)

    places = torch.where(torch.isfinite(boxes).all(1, keepdim=True), boxes, 0)  # an empty box overlaps nothing
    columns = (places.double().cpu().numpy(), scores.double().cpu().numpy(), labels.cpu().numpy())
    new = torch.from_numpy(decayed(*columns, decay, min_score)).to(scores)
    order = _order(new, scores)
    keep = order[new[order] >= min_score]
    return keep, new[keep]


def _check(boxes: Tensor, scores: Tensor, labels: Tensor | None, threshold: float) -> Tensor:
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


def _order(rank: Tensor, scores: Tensor) -> Tensor:
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
