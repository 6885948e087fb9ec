"""IoU-guided NMS (Jiang et al., ECCV 2018, Algorithm 1), and the baselines it is judged against.

In each cluster of overlapping boxes of one class, greedy NMS keeps the box the classifier likes best. IoU-guided NMS
keeps the box that is predicted to fit best and gives it the highest class score of the cluster, so localisation chooses
the box while classification keeps the ranking between clusters.

No N x N matrix: overlapping pairs are found by a sweep over x and stored as a list, so memory is O(N + matches).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from iou_refiner._checks import (
    check_boxes,
    check_choice,
    check_fraction,
    check_positive,
    check_same_device,
    check_vector,
)
from iou_refiner.boxes import paired_iou

# Candidate pairs tested at once by the sweep: bounds its scratch memory to about 200 MB.
_CHUNK_PAIRS = 2_000_000


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
    owner = _suppress(boxes, _order(ious, scores), labels, threshold)
    merged = torch.full_like(scores, -torch.inf).scatter_reduce_(0, owner, scores, "amax")
    keep = _kept(owner, _order(ious, scores))
    return keep, merged[keep]


def nms(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, *, threshold: float = 0.5) -> Tensor:
    """Greedy NMS per class: indices (K,) of the kept boxes by falling score. Arguments as :func:`iou_guided_nms`."""
    labels = _check(boxes, scores, labels, threshold)
    order = _order(scores, scores)
    return _kept(_suppress(boxes, order, labels, threshold), order)


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
    new = scores.clone()
    for label in torch.unique(labels):
        rows = torch.nonzero(labels == label).flatten()
        new[rows] = _decay(boxes[rows], scores[rows], method, sigma, threshold, min_score)
    order = _order(new, scores)
    keep = order[new[order] >= min_score]
    return keep, new[keep]


def _decay(boxes: Tensor, scores: Tensor, method: str, sigma: float, threshold: float, min_score: float) -> Tensor:
    """New scores of the boxes of one class. Boxes take their turn by falling current score."""
    first, second, iou = _overlapping_pairs(boxes, torch.zeros_like(scores, dtype=torch.int64), 0.0)
    factor = torch.exp(-(iou**2) / sigma) if method == "gaussian" else torch.where(iou > threshold, 1 - iou, 1.0)
    # Neighbours of each box as slices of one list, so that a turn costs its neighbours, not all boxes.
    owner, neighbour = torch.cat([first, second]), torch.cat([second, first])
    by_owner = owner.argsort(stable=True)
    neighbour, factor = neighbour[by_owner], factor.repeat(2)[by_owner]
    bounds = torch.searchsorted(owner[by_owner], torch.arange(len(boxes) + 1, device=boxes.device)).tolist()
    current, waiting = scores.clone(), scores.clone()  # `waiting` is `current`, with -inf where the turn is over
    for _ in range(len(boxes)):
        best = int(waiting.argmax())
        if not current[best] >= min_score:
            break
        waiting[best] = -torch.inf
        touched = slice(bounds[best], bounds[best + 1])
        later = neighbour[touched][waiting[neighbour[touched]] > -torch.inf]
        current[later] *= factor[touched][waiting[neighbour[touched]] > -torch.inf].to(current.dtype)
        waiting[later] = current[later]
    return current


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
    """Indices by falling rank; ties by falling score, then by index."""
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[rank[by_score].argsort(descending=True, stable=True)]


def _kept(owner: Tensor, order: Tensor) -> Tensor:
    return order[owner[order] == order]


def _suppress(boxes: Tensor, order: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The kept box that owns each box (N,); a kept box owns itself.

    Greedy suppression solved by rounds: a box is kept once no undecided or kept box ranked above it overlaps it, and a
    box overlapped by a kept one is removed. A round decides every box at the head of its chain, so the number of rounds
    is the length of the longest chain, not the number of boxes.
    """
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    first, second, _ = _overlapping_pairs(boxes, labels, threshold)
    swap = position[first] > position[second]
    better, worse = torch.where(swap, second, first), torch.where(swap, first, second)
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    decided = kept.clone()
    while not bool(decided.all()):
        blocked = torch.zeros_like(kept).index_fill_(0, worse[~decided[better]], True)
        fresh = ~decided & ~blocked  # everything above them is decided, and none of it removed them
        kept |= fresh
        decided |= fresh
        decided.index_fill_(0, worse[kept[better]], True)
    # The owner of a removed box is the best ranked of the kept boxes that overlap it.
    last = len(order)
    claim = torch.full_like(position, last)
    by_kept = kept[better]
    claim.scatter_reduce_(0, worse[by_kept], position[better[by_kept]], "amin")
    return torch.where(kept, torch.arange(last, device=order.device), order[claim.clamp(max=max(last - 1, 0))])


def _overlapping_pairs(boxes: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of one class with IoU above ``threshold``: two index vectors and the IoU.

    Boxes sorted by (label, x1): the partners of a box are the ones after it that start before it ends. Coordinates are
    replaced by their ranks, and each label gets a strip of ranks of its own, so that one search serves all labels and
    no coordinate, however far out, costs the others their precision.
    """
    boxes = boxes.double()
    finite = torch.isfinite(boxes).all(1)  # a box that is not finite overlaps nothing
    rows = torch.nonzero(finite).flatten()
    if not len(rows):
        none = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return none, none, boxes.new_zeros(0)
    boxes, labels = boxes[rows], labels[rows]
    left, right = torch.unique(boxes[:, [0, 2]], return_inverse=True)[1].unbind(1)
    strip = torch.unique(labels, return_inverse=True)[1] * (2 * len(rows))
    starts, by_start = (left + strip).sort(stable=True)
    ends = (right + strip)[by_start]
    count = torch.searchsorted(starts, ends) - torch.arange(1, len(rows) + 1, device=boxes.device)
    count = count.clamp(min=0)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    piece = (count.cumsum(0) / _CHUNK_PAIRS).long()
    bounds = [0, *(torch.nonzero(piece.diff()).flatten() + 1).tolist(), len(rows)]
    for begin, end in pairwise(bounds):
        part = count[begin:end]
        one = torch.repeat_interleave(torch.arange(begin, end, device=boxes.device), part)
        step = torch.arange(len(one), device=boxes.device) - torch.repeat_interleave(part.cumsum(0) - part, part)
        one, two = by_start[one], by_start[one + 1 + step]
        iou = paired_iou(boxes[one], boxes[two])
        hit = iou > threshold
        found.append((rows[one[hit]], rows[two[hit]], iou[hit]))
    first, second, iou = (torch.cat(column) for column in zip(*found, strict=True))
    return first, second, iou
