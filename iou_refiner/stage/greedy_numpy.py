"""Greedy suppression on the CPU, in numpy: its calls cost a fifth of torch's, which counts for a thousand boxes.

There is no N x N matrix, and no list of all overlapping pairs, of which N equal boxes have N^2 / 2. The best-ranked
boxes are decided first, as many at a time as a budget of pairs allows, and the boxes they remove are never considered
again. So memory is O(N), and time grows with the boxes that survive. :mod:`iou_refiner.stage.greedy_torch` is the same
algorithm in torch operators, for other devices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from iou_refiner.numpy_boxes import iou_of_corners

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Pairs tested at once: bounds the scratch memory to about 100 MB.
_CHUNK_PAIRS = 500_000
# And as a multiple of the boxes that are left: what the first heads remove need not be paired by the others. Under
# a few pairs a round costs the calls it makes, whatever their number.
_PAIRS_PER_BOX, _FEW_PAIRS = 2, 2000


def order(rank: FloatArray, scores: FloatArray) -> IntArray:
    """Indices (N,) by falling rank; ties by falling score, then by index."""
    by_rank = (-rank).argsort()
    ranks = rank.take(by_rank)
    return np.lexsort((-scores, -rank)) if (ranks[1:] == ranks[:-1]).any() else by_rank  # without ties, the fastest


@np.errstate(over="ignore", invalid="ignore")  # diverged boxes are infinitely large, and overlap nothing
def owners(boxes: FloatArray, labels: IntArray, threshold: float) -> IntArray:
    """The kept box that owns each box, the best ranked of those that overlap it; a kept box owns itself.

    Args:
        boxes: (N, 4) xyxy by falling rank. Boxes that are empty or not finite meet nobody.
        labels: (N,); boxes of different labels never meet.
        threshold: IoU above which two boxes overlap.

    Returns:
        (N,) rows of ``boxes``.
    """
    owner = np.arange(len(boxes))
    low, high = np.split(boxes.T, 2)  # (2, N): left and top, right and bottom
    rank = np.flatnonzero(np.isfinite(boxes.T).all(0) & (high > low).all(0))
    order, begin, end = windows(low.take(rank, 1), high.take(rank, 1), labels.take(rank), threshold)
    rank = rank.take(order)
    low, high = low.take(rank, 1), high.take(rank, 1)
    area = (high - low).prod(0)
    while len(rank):
        # The best of those left, as many as the budget allows: no other can remove them, and they decide the rest.
        by_rank, count = rank.argsort(), end - begin
        budget = min(max(_PAIRS_PER_BOX * len(rank), _FEW_PAIRS), _CHUNK_PAIRS)
        heads = by_rank[: max(1, int(count.take(by_rank).cumsum().searchsorted(budget, side="right")))]
        better, worse = _overlaps(low, high, area, rank, heads, begin.take(heads), count.take(heads), threshold)
        keep = _greedy(heads, better, worse, len(rank))
        claims = keep.take(better).nonzero()[0]
        claim = np.full(len(rank), len(boxes))
        np.minimum.at(claim, worse.take(claims), rank.take(better.take(claims)))
        removed = claim < len(boxes)
        owner[rank.compress(removed)] = claim.compress(removed)
        undecided = ~(keep | removed)
        before = np.concatenate([[0], undecided.cumsum()])  # undecided boxes before each
        left = undecided.nonzero()[0]
        begin, end = before.take(begin.take(left)), before.take(end.take(left))
        rank, low, high, area = rank.take(left), low.take(left, 1), high.take(left, 1), area.take(left)
    return owner


def _overlaps(
    low: FloatArray,
    high: FloatArray,
    area: FloatArray,
    rank: IntArray,
    heads: IntArray,
    begin: IntArray,
    count: IntArray,
    threshold: float,
) -> tuple[IntArray, IntArray]:
    """Pairs of a head and a box ranked below it in its window that overlap: two index vectors."""
    head = np.arange(len(heads)).repeat(count)
    worse = (begin - count.cumsum() + count).take(head)
    worse += np.arange(len(worse))
    better = heads.take(head)
    below = (rank.take(worse) > rank.take(better)).nonzero()[0]
    better, worse = better.take(below), worse.take(below)
    iou = iou_of_corners(
        low.take(better, 1), high.take(better, 1), low.take(worse, 1), high.take(worse, 1),
        area.take(better), area.take(worse),
    )  # fmt: skip
    hit = (iou > threshold).nonzero()[0]
    return better.take(hit), worse.take(hit)


def _greedy(heads: IntArray, better: IntArray, worse: IntArray, count: int) -> BoolArray:
    """Which of ``count`` boxes are heads that survive, (count,) bool, given every overlap of a head with one below it.

    Greedy suppression solved by rounds: a box is kept once no undecided or kept box ranked above it overlaps it, and a
    box overlapped by a kept one is removed. A round decides every box at the head of its chain, so the number of rounds
    is the length of the longest chain, not the number of boxes.
    """
    undecided, keep = np.zeros(count, bool), np.zeros(count, bool)
    undecided[heads] = True
    among = undecided.take(worse).nonzero()[0]
    while len(among):
        better, worse = better.take(among), worse.take(among)
        fresh = undecided.copy()
        fresh[worse] = False  # everything above the others is decided, and none of it removed them
        keep |= fresh
        undecided ^= fresh
        undecided[worse.compress(fresh.take(better))] = False
        among = (undecided.take(better) & undecided.take(worse)).nonzero()[0]
    return keep | undecided


def windows(
    low: FloatArray, high: FloatArray, labels: IntArray, threshold: float
) -> tuple[IntArray, IntArray, IntArray]:
    """The order of sound boxes by label and left edge, and where in it the partners of each may start and end.

    With IoU above t, two boxes share more than t of the wider one. So the partner of a box of width w starts less than
    (1 - t) w after it, and, being narrower than w / t, less than (1 - t) w / t before it.
    """
    left, width = low[0], (high[0] - low[0]) * (1 + 1e-9)  # rounding must not cost a partner
    if np.abs(labels).max(initial=0) >= 2**31:  # too large for the upper half of a key
        labels = np.unique(labels, return_inverse=True)[1]
    labels = labels << 32
    before = width * ((1 - threshold) / threshold) if threshold > 0 else np.full_like(width, np.inf)
    slack = np.abs(left) * 1e-12
    keys = _keys(left, labels)
    order = keys.argsort()
    starts = keys.take(order)
    lowest = _keys(left - before - slack, labels).take(order)
    highest = _keys(left + (1 - threshold) * width + slack, labels).take(order)
    return order, starts.searchsorted(lowest), starts.searchsorted(highest, side="right")


def _keys(places: FloatArray, label: IntArray) -> IntArray:
    """Integers (N,) in the order of the labels and, within one, of the places rounded to float32, however far out."""
    bits = (places.astype(np.float32) + np.float32(0)).view(np.int32)  # + 0: a negative zero is no other place
    return label + np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
