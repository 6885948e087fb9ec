"""IoU-guided NMS (Jiang et al., ECCV 2018, Algorithm 1), and the baselines it is judged against.

In each cluster of overlapping boxes of one class, greedy NMS keeps the box the classifier likes best. IoU-guided NMS
keeps the box that is predicted to fit best and gives it the highest class score of the cluster, so localisation chooses
the box while classification keeps the ranking between clusters.

No N x N matrix and no list of all overlapping pairs, of which N equal boxes have N^2 / 2. The best-ranked boxes are
decided first, as many at a time as a budget of pairs allows, and what they remove is never looked at again. So memory
is O(N), and the time goes with the boxes that survive. Soft-NMS takes its turns in all classes at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
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
from iou_refiner.boxes import paired_iou, valid_boxes

# Pairs tested at once: bounds the scratch memory to about 100 MB.
_CHUNK_PAIRS = 500_000
# And as a multiple of the boxes that are left: what the first heads remove need not be paired by the others.
_PAIRS_PER_BOX = 8

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


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
    owner = _suppress(boxes, order, labels, threshold)
    merged = torch.full_like(scores, -torch.inf).scatter_reduce_(0, owner, scores, "amax")
    keep = _kept(owner, order)
    return keep, _at(merged, keep)


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

    def decay(iou: FloatArray) -> FloatArray:
        return np.exp(-(iou**2) / sigma) if method == "gaussian" else np.where(iou > threshold, 1 - iou, 1.0)

    places = torch.where(torch.isfinite(boxes).all(1, keepdim=True), boxes, 0)  # an empty box overlaps nothing
    columns = (places.double().cpu().numpy(), scores.double().cpu().numpy(), labels.cpu().numpy())
    new = torch.from_numpy(_decayed(*columns, decay, min_score)).to(scores)
    order = _order(new, scores)
    keep = order[new[order] >= min_score]
    return keep, new[keep]


def _decayed(
    boxes: FloatArray, scores: FloatArray, labels: IntArray, decay: Callable[[FloatArray], FloatArray], minimum: float
) -> FloatArray:
    """New scores (N,). Classes of like size share a padded table, so that one step is a turn in each of them."""
    new = scores.copy()
    by_label = labels.argsort(kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    starts = sizes.cumsum() - sizes
    tables = np.log2(sizes).astype(int) // 2  # sizes within a factor of 4: at most as much padding
    for table in np.unique(tables):
        start, size = starts[tables == table, None], sizes[tables == table, None]
        step = np.arange(size.max())
        rows, used = by_label[np.minimum(start + step, len(labels) - 1)], step < size
        turned = _take_turns(boxes[rows], np.where(used, scores[rows], -np.inf), decay, minimum)
        new[rows[used]] = turned[used]
    return new


def _take_turns(
    boxes: FloatArray, waiting: FloatArray, decay: Callable[[FloatArray], FloatArray], minimum: float
) -> FloatArray:
    """Scores (L, M) after every line of boxes (L, M, 4) has taken its turns, by falling current score.

    ``waiting`` holds the scores, -inf where there is no box; it is used up.
    """
    new, lines = waiting.copy(), np.arange(len(waiting))
    x1, y1, x2, y2 = np.moveaxis(boxes, 2, 0).copy()
    area = (x2 - x1).clip(min=0) * (y2 - y1).clip(min=0)
    for _ in range(waiting.shape[1]):
        best = waiting.argmax(1)
        turn = waiting[lines, best] >= minimum  # a line below it is through
        if not turn.any():
            break
        at = lines[turn], best[turn]
        new[at] = waiting[at]
        waiting[at] = -np.inf
        one = lines, best, None
        width = np.minimum(x2, x2[one]) - np.maximum(x1, x1[one])
        height = np.minimum(y2, y2[one]) - np.maximum(y1, y1[one])
        shared = width.clip(min=0) * height.clip(min=0)
        iou = shared / np.maximum(area + area[one] - shared, np.finfo(area.dtype).tiny)
        np.multiply(waiting, decay(iou), out=waiting, where=turn[:, None] & (waiting > -np.inf))
    return np.where(waiting > -np.inf, waiting, new)


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


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]`` at a tenth of its overhead, which is what counts for a thousand boxes."""
    return values.index_select(0, rows)


def _order(rank: Tensor, scores: Tensor) -> Tensor:
    """Indices by falling rank; ties by falling score, then by index."""
    by_score = scores.argsort(descending=True, stable=True)
    return _at(by_score, _at(rank, by_score).argsort(descending=True, stable=True))


def _kept(owner: Tensor, order: Tensor) -> Tensor:
    return _at(order, torch.nonzero(_at(owner, order) == order).flatten())


def _suppress(boxes: Tensor, order: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """The kept box that owns each box (N,), the best ranked of those that overlap it; a kept box owns itself."""
    owner = torch.arange(len(order), device=order.device)
    rank = torch.empty_like(order)
    rank[order] = owner
    rows, begin, end = _windows(boxes, labels, threshold)
    boxes, rank = _at(boxes, rows).double(), _at(rank, rows)
    by_rank = rank.argsort()
    while len(rows):
        # The best of those left, as many as the budget allows: no other can remove them, and they decide the rest.
        pairs = _at(end - begin, by_rank).cumsum(0)
        budget = min(_PAIRS_PER_BOX * len(rows), _CHUNK_PAIRS)
        heads = by_rank[: max(1, int(torch.searchsorted(pairs, budget, right=True)))]
        better, worse = _overlaps(boxes, rank, heads, _at(begin, heads), _at(end, heads), threshold)
        kept = _greedy(heads, better, worse, len(rows))
        claims = torch.nonzero(_at(kept, better)).flatten()
        claim = torch.full_like(rank, len(order))
        claim.scatter_reduce_(0, _at(worse, claims), _at(rank, _at(better, claims)), "amin")
        removed = torch.nonzero(claim < len(order)).flatten()
        owner.index_copy_(0, _at(rows, removed), _at(order, _at(claim, removed)))
        left = (~kept).index_fill_(0, removed, False)
        before = torch.cat([left.new_zeros(1, dtype=torch.int64), left.cumsum(0)])  # rows left before each row
        by_rank = _at(before, _at(by_rank, torch.nonzero(_at(left, by_rank)).flatten()))
        left = torch.nonzero(left).flatten()
        begin, end = _at(before, _at(begin, left)), _at(before, _at(end, left))
        rows, boxes, rank = _at(rows, left), _at(boxes, left), _at(rank, left)
    return owner


def _overlaps(
    boxes: Tensor, rank: Tensor, heads: Tensor, begin: Tensor, end: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Pairs of a head and a box ranked below it in its window that overlap: two index vectors."""
    count = end - begin
    owner = torch.repeat_interleave(count)
    better = _at(heads, owner)
    worse = (begin - count.cumsum(0) + count).index_select(0, owner)
    worse += torch.arange(len(worse), device=boxes.device)
    below = torch.nonzero(_at(rank, worse) > _at(rank, better)).flatten()
    better, worse = _at(better, below), _at(worse, below)
    columns = boxes.t().contiguous()  # arithmetic on whole columns, not on rows of four
    iou = paired_iou(columns.index_select(1, better).t(), columns.index_select(1, worse).t())
    hit = torch.nonzero(iou > threshold).flatten()
    return _at(better, hit), _at(worse, hit)


def _greedy(heads: Tensor, better: Tensor, worse: Tensor, count: int) -> Tensor:
    """Which of ``count`` boxes are heads that survive, (count,) bool, given every overlap of a head with one below it.

    Greedy suppression solved by rounds: a box is kept once no undecided or kept box ranked above it overlaps it, and a
    box overlapped by a kept one is removed. A round decides every box at the head of its chain, so the number of rounds
    is the length of the longest chain, not the number of boxes.
    """
    undecided = torch.zeros(count, dtype=torch.bool, device=heads.device).index_fill_(0, heads, True)
    kept = torch.zeros_like(undecided)
    among = torch.nonzero(_at(undecided, worse)).flatten()
    while bool(undecided.any()):
        better, worse = _at(better, among), _at(worse, among)
        fresh = undecided.index_fill(0, worse, False)  # everything above them is decided, and none of it removed them
        kept |= fresh
        undecided ^= fresh
        undecided.index_fill_(0, _at(worse, torch.nonzero(_at(fresh, better)).flatten()), False)
        among = torch.nonzero(_at(undecided, better) & _at(undecided, worse)).flatten()
    return kept


def _windows(boxes: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of all sound boxes by label and left edge, and where in them the partners of each may start and end.

    With IoU above t, two boxes share more than t of the wider one. So the partner of a box of width w starts less than
    (1 - t) w after it, and, being narrower than w / t, less than (1 - t) w / t before it.
    """
    rows = torch.nonzero(valid_boxes(boxes)).flatten()
    left, _, right, _ = _at(boxes, rows).double().unbind(1)
    label = torch.unique(_at(labels, rows), return_inverse=True)[1]
    width = (right - left) * (1 + 1e-9)  # rounding must not cost a partner
    before = width * ((1 - threshold) / threshold) if threshold > 0 else torch.full_like(width, torch.inf)
    slack = left.abs() * 1e-12
    starts, by_start = _keys(left, label).sort()
    lowest = _at(_keys(left - before - slack, label), by_start)
    highest = _keys(left + (1 - threshold) * width + slack, label).index_select(0, by_start)
    return _at(rows, by_start), torch.searchsorted(starts, lowest), torch.searchsorted(starts, highest, right=True)


def _keys(places: Tensor, label: Tensor) -> Tensor:
    """Integers (N,) in the order of the labels and, within one, of the places rounded to float32, however far out."""
    bits = (places.float() + 0.0).view(torch.int32)  # + 0.0: a negative zero is no other place
    return (label << 32) + torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
