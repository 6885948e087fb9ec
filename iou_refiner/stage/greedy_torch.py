"""Greedy suppression in torch operators, for boxes on a device; see :mod:`iou_refiner.stage.greedy_numpy`."""

from __future__ import annotations

import torch
from torch import Tensor

from iou_refiner.boxes import paired_iou, valid_boxes

_CHUNK_PAIRS = 500_000
_PAIRS_PER_BOX = 8  # more than on the CPU: every round waits for the device


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """``values[rows]`` at a tenth of its overhead."""
    return values.index_select(0, rows)


def order(rank: Tensor, scores: Tensor) -> Tensor:
    """As :func:`iou_refiner.stage.greedy_numpy.order`."""
    by_score = scores.argsort(descending=True, stable=True)
    return _at(by_score, _at(rank, by_score).argsort(descending=True, stable=True))


def owners(boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """As :func:`iou_refiner.stage.greedy_numpy.owners`."""
    owner = torch.arange(len(boxes), device=boxes.device)
    rank, begin, end = windows(boxes, labels, threshold)
    boxes = _at(boxes, rank).double()
    by_rank = rank.argsort()
    while len(rank):
        # The best of those left, as many as the budget allows: no other can remove them, and they decide the rest.
        pairs = _at(end - begin, by_rank).cumsum(0)
        budget = min(_PAIRS_PER_BOX * len(rank), _CHUNK_PAIRS)
        heads = by_rank[: max(1, int(torch.searchsorted(pairs, budget, right=True)))]
        better, worse = _overlaps(boxes, rank, heads, _at(begin, heads), _at(end, heads), threshold)
        keep = _greedy(heads, better, worse, len(rank))
        claims = torch.nonzero(_at(keep, better)).flatten()
        claim = torch.full_like(rank, len(owner))
        claim.scatter_reduce_(0, _at(worse, claims), _at(rank, _at(better, claims)), "amin")
        removed = torch.nonzero(claim < len(owner)).flatten()
        owner.index_copy_(0, _at(rank, removed), _at(claim, removed))
        left = (~keep).index_fill_(0, removed, False)
        before = torch.cat([left.new_zeros(1, dtype=torch.int64), left.cumsum(0)])  # rows left before each row
        by_rank = _at(before, _at(by_rank, torch.nonzero(_at(left, by_rank)).flatten()))
        left = torch.nonzero(left).flatten()
        begin, end = _at(before, _at(begin, left)), _at(before, _at(end, left))
        boxes, rank = _at(boxes, left), _at(rank, left)
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
    keep = torch.zeros_like(undecided)
    among = torch.nonzero(_at(undecided, worse)).flatten()
    while bool(undecided.any()):
        better, worse = _at(better, among), _at(worse, among)
        fresh = undecided.index_fill(0, worse, False)  # everything above them is decided, and none of it removed them
        keep |= fresh
        undecided ^= fresh
        undecided.index_fill_(0, _at(worse, torch.nonzero(_at(fresh, better)).flatten()), False)
        among = torch.nonzero(_at(undecided, better) & _at(undecided, worse)).flatten()
    return keep


def windows(boxes: Tensor, labels: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
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
