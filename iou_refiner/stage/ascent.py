"""Gradient ascent of boxes on a score: the optimization-based refinement of the paper.

Both functions know boxes and a score, nothing about features or detectors: the score is any differentiable function of
boxes. :func:`refine_boxes` is the one to use; :func:`refine_boxes_paper` is Algorithm 2 of the paper to the letter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iou_refiner.boxes import decode_boxes, valid_boxes
from iou_refiner.checks import check_boxes, check_positive

#: (boxes (K, 4), rows (K,)) -> scores (K,), where ``rows`` are the input rows that the boxes stand for.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Refinement:
    """The outcome of refining N boxes.

    Attributes:
        boxes: (N, 4) xyxy, always finite where the input was; untouched rows are bit-identical to the input.
        score: (N,) score of ``boxes``; NaN where it is not defined.
        start_score: (N,) score of the input boxes.
        moved: (N,) bool, the boxes that differ from the input.
        undone: number of steps undone because their score was not finite.
        forwards: number of evaluations of the score.
    """

    boxes: Tensor
    score: Tensor
    start_score: Tensor
    moved: Tensor
    undone: int
    forwards: int


def refine_boxes(
    score: Score,
    boxes: Tensor,
    *,
    steps: int = 5,
    step_size: float = 0.1,
    shrink: float = 0.5,
    min_gain: float = 0.0,
    tolerance: float = 1e-4,
) -> Refinement:
    """Move each box uphill on its score, in coordinates relative to its own size, with backtracking.

    A box is ``(cx / w, cy / h, log w, log h)`` with the ``w, h`` it starts from, so one step size fits objects of every
    size (the paper steps in pixels, which on a 512 px box is next to nothing). Every box has its own step size: a step
    that raises the score is taken; one that does not is undone, and the step size shrinks. So the score never falls,
    and the best position is the one returned. Boxes whose gain falls below ``tolerance`` leave the batch. ``steps``
    steps cost ``steps + 1`` evaluations: the score that accepts a step also starts the next one.

    Works under ``torch.no_grad()`` and ``torch.inference_mode()``; computes gradients to the boxes alone.

    Args:
        score: differentiable ``(boxes (K, 4), rows (K,)) -> (K,)``; ``rows`` are the input rows the boxes stand for.
        boxes: (N, 4) float xyxy. Rows that are empty or not finite are returned untouched.
        steps: most steps a box may try.
        step_size: length of the first step, in relative coordinates per unit of gradient.
        shrink: factor on the step size of a box after a step that failed.
        min_gain: a box whose score rises by no more than this in the end is returned untouched.
        tolerance: gain below which a box has converged.

    Returns:
        A :class:`Refinement`.

    Raises:
        ValueError: bad shapes or a setting out of range.
    """
    _check(boxes, steps, step_size)
    if not 0 < shrink < 1:
        raise ValueError(f"`shrink` must lie in (0, 1), got {shrink!r}.")
    with torch.inference_mode(False):
        reference = boxes.detach().clone().float()
        position = torch.zeros_like(reference)  # relative coordinates of the best box so far
        step = torch.full_like(reference[:, 0], step_size)
        rows = torch.nonzero(valid_boxes(reference)).flatten()
        best = torch.full_like(step, torch.nan)
        gradient = torch.zeros_like(reference)
        best[rows], gradient[rows] = _evaluate(score, position, reference, rows, with_gradient=steps > 0)
        start, undone, forwards = best.clone(), 0, 1 if len(rows) else 0
        for iteration in range(steps):
            rows = rows[torch.isfinite(best[rows]) & torch.isfinite(gradient[rows]).all(1)]
            if not len(rows):
                break
            trial = position.clone()
            trial[rows] += step[rows, None] * gradient[rows]
            value, slope = _evaluate(score, trial, reference, rows, with_gradient=iteration + 1 < steps)
            forwards += 1
            finite = torch.isfinite(value)
            undone += int((~finite).sum())
            gain = torch.where(finite, value - best[rows], -torch.inf)
            accepted, rejected = rows[gain > 0], rows[gain <= 0]
            position[accepted], best[accepted], gradient[accepted] = trial[accepted], value[gain > 0], slope[gain > 0]
            step[rejected] *= shrink
            rows = rows[(gain <= 0) | (gain > tolerance)]
        refined = decode_boxes(position, reference).to(boxes.dtype)
        moved = (best > start + min_gain) & valid_boxes(refined)
        refined = torch.where(moved[:, None], refined, boxes.detach())
        return Refinement(refined, torch.where(moved, best, start), start, moved, undone, forwards)


def refine_boxes_paper(
    score: Score,
    boxes: Tensor,
    *,
    steps: int = 5,
    step_size: float = 0.5,
    early_stop: float = 0.001,
    degeneration: float = -0.01,
) -> Refinement:
    """Algorithm 2 of the paper, to the letter, for comparison.

    Each step adds ``step_size * gradient * size`` pixels along each axis. A box stops once the score changes by less
    than ``early_stop`` (Omega_1) or falls by more than ``-degeneration`` (Omega_2) - and then, as printed, stays at the
    worse position. Boxes may leave the image or invert; nothing is undone.

    Args and returns as :func:`refine_boxes`.
    """
    _check(boxes, steps, step_size)
    with torch.inference_mode(False):
        current = boxes.detach().clone()
        rows = torch.nonzero(valid_boxes(current)).flatten()
        previous = torch.full_like(current[:, 0], torch.nan)
        start, forwards = previous.clone(), 0
        for _ in range(steps):
            if not len(rows):
                break
            with torch.enable_grad():
                point = current[rows].requires_grad_()
                value = score(point, rows)
                (slope,) = torch.autograd.grad(value.sum(), point)
            value = value.detach().to(start.dtype)
            start[rows] = torch.where(torch.isnan(start[rows]), value, start[rows])
            size = (point[:, 2:] - point[:, :2]).detach().repeat(1, 2)
            current[rows] += step_size * slope * size
            with torch.no_grad():
                after = score(current[rows], rows).to(start.dtype)
            forwards += 2
            previous[rows] = after
            change = after - value
            rows = rows[~((change.abs() < early_stop) | (change < degeneration))]
        moved = (current != boxes).any(1) & valid_boxes(boxes)
        return Refinement(current, previous, start, moved, 0, forwards)


def _evaluate(
    score: Score, position: Tensor, reference: Tensor, rows: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Score of the boxes at ``position[rows]``, and its gradient in relative coordinates (zeros if not needed)."""
    point = position[rows]
    if not len(rows):
        return point.new_zeros(0), point
    if not with_gradient:
        with torch.no_grad():
            return score(decode_boxes(point, reference[rows]), rows).float(), torch.zeros_like(point)
    with torch.enable_grad():
        point.requires_grad_()
        value = score(decode_boxes(point, reference[rows]), rows)
        (slope,) = torch.autograd.grad(value.sum(), point)
    return value.detach().float(), slope


def _check(boxes: Tensor, steps: int, step_size: float) -> None:
    check_boxes("boxes", boxes)
    check_positive("step_size", step_size)
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps!r}.")
