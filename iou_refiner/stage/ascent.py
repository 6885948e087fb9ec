"""Gradient ascent on the predicted IoU, or on whatever else says how well a box fits.

Both functions know boxes and a score, nothing of features or detectors: the score is any differentiable function of
boxes. :func:`refine_boxes` is what to use; :func:`refine_boxes_paper` is the paper's Algorithm 2 to the letter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from iou_refiner.boxes import decode_boxes, valid_boxes
from iou_refiner.checks import check_boxes, check_positive

# (boxes (K, 4), rows (K,)) -> scores (K,): the predicted IoU of the boxes now standing for the given rows of the input.
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Refinement:
    """The outcome of refining N boxes.

    Attributes:
        boxes: (N, 4) xyxy, always finite where the input was; untouched rows are bit-identical to the input.
        score: (N,) predicted IoU of ``boxes``; NaN where it could not be predicted.
        start_score: (N,) predicted IoU of the input boxes.
        moved: (N,) bool.
        undone: number of steps undone because their score was not finite.
        forwards: times the score was evaluated.
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
    margin: float = 0.0,
    tolerance: float = 1e-4,
) -> Refinement:
    """Move each box uphill on the predicted IoU, in coordinates relative to its own size.

    A box is ``(cx / w, cy / h, log w, log h)`` with the ``w, h`` it starts from, so one step size fits objects of every
    size (the paper steps in pixels, which on a 512 px box is next to nothing). Every box has its own step: a step that
    raises the score is taken, one that does not is undone and the step shrinks. So the score never falls, and the best
    position seen is the one returned. Boxes whose gain falls below ``tolerance`` leave the batch. ``steps`` steps cost
    ``steps + 1`` evaluations: the score that judges a step also starts the next one.

    Works under ``torch.no_grad()`` and ``torch.inference_mode()``; asks for gradients to the boxes alone.

    Args:
        score: differentiable ``(boxes (K, 4), rows (K,)) -> (K,)``; ``rows`` are the input rows the boxes stand for.
        boxes: (N, 4) float xyxy. Rows that are empty or not finite are returned untouched.
        steps: most steps a box may try.
        step_size: first step, in relative coordinates per unit of gradient.
        shrink: factor on the step of a box after a step that failed.
        margin: a box whose predicted gain in the end is not above this is returned untouched.
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
        anchors = boxes.detach().clone().float()
        position = torch.zeros_like(anchors)  # relative coordinates of the best box so far
        step = torch.full_like(anchors[:, 0], step_size)
        rows = torch.nonzero(valid_boxes(anchors)).flatten()
        best = torch.full_like(step, torch.nan)
        gradient = torch.zeros_like(anchors)
        best[rows], gradient[rows] = _evaluate(score, position, anchors, rows, with_gradient=steps > 0)
        start, undone, forwards = best.clone(), 0, 1 if len(rows) else 0
        for iteration in range(steps):
            rows = rows[torch.isfinite(best[rows]) & torch.isfinite(gradient[rows]).all(1)]
            if not len(rows):
                break
            trial = position.clone()
            trial[rows] += step[rows, None] * gradient[rows]
            value, slope = _evaluate(score, trial, anchors, rows, with_gradient=iteration + 1 < steps)
            forwards += 1
            finite = torch.isfinite(value)
            undone += int((~finite).sum())
            gain = torch.where(finite, value - best[rows], -torch.inf)
            better, worse = rows[gain > 0], rows[gain <= 0]
            position[better], best[better], gradient[better] = trial[better], value[gain > 0], slope[gain > 0]
            step[worse] *= shrink
            rows = rows[(gain <= 0) | (gain > tolerance)]
        refined = decode_boxes(position, anchors).to(boxes.dtype)
        moved = (best > start + margin) & valid_boxes(refined)
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
    score: Score, position: Tensor, anchors: Tensor, rows: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Score of the boxes at ``position[rows]`` and, if wanted, its gradient in relative coordinates."""
    point = position[rows]
    if not len(rows):
        return point.new_zeros(0), point
    if not with_gradient:
        with torch.no_grad():
            return score(decode_boxes(point, anchors[rows]), rows).float(), torch.zeros_like(point)
    with torch.enable_grad():
        point.requires_grad_()
        value = score(decode_boxes(point, anchors[rows]), rows)
        (slope,) = torch.autograd.grad(value.sum(), point)
    return value.detach().float(), slope


def _check(boxes: Tensor, steps: int, step_size: float) -> None:
    check_boxes("boxes", boxes)
    check_positive("step_size", step_size)
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps!r}.")
