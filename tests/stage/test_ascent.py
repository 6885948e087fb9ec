"""Refinement: laws of the ascent with the true IoU as the score, and Algorithm 2 against a literal loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.boxes import paired_iou, valid_boxes
from iou_refiner.head.config import HeadConfig
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.ascent import Refinement, Score, refine_boxes, refine_boxes_paper
from iou_refiner.structures import FeatureMaps
from tests.kit.reference import refine_paper_reference

NAN, INF = float("nan"), float("inf")


def true_iou(gt_boxes: Tensor) -> Score:
    """The score of a perfect head: the IoU with the known object."""
    return lambda boxes, rows: paired_iou(boxes, gt_boxes[rows].to(boxes))


def noisy_boxes(side: float = 100, count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes whose corners are off by 6 % of the side, and the objects they mean."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 4 * side
    size = side * (0.7 + 0.6 * torch.rand(count, 2, generator=generator))
    gt_boxes = torch.cat([corner, corner + size], 1)
    return gt_boxes + 0.06 * size.repeat(1, 2) * torch.randn(count, 4, generator=generator), gt_boxes


def counted(score: Score) -> tuple[Score, list[int]]:
    calls: list[int] = []

    def watched(boxes: Tensor, rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return score(boxes, rows)

    return watched, calls


def nowhere(value: float) -> Score:
    """A score that is ``value`` everywhere, though formally differentiable."""
    return lambda boxes, rows: boxes.sum(1) * 0 + value


def lying_slope(slope: float) -> Score:
    """A score that grows to the right and stays finite at infinity, but says that its gradient is ``slope``."""

    class Lie(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, boxes: Tensor) -> Tensor:
            return torch.atan(boxes[:, 0])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return torch.full((len(grad), 4), slope) * torch.tensor([1.0, 0, 1, 0])

    return lambda boxes, rows: Lie.apply(boxes)


# ---- refine_boxes. ----


@pytest.mark.parametrize("side", [16, 32, 64, 128, 256, 512])
def test_objects_of_every_size_gain_alike(side: float) -> None:
    boxes, gt_boxes = noisy_boxes(side)
    before, after = (
        paired_iou(each, gt_boxes).mean() for each in (boxes, refine_boxes(true_iou(gt_boxes), boxes).boxes)
    )
    assert 0.78 < float(before) < 0.86
    assert float(after - before) == pytest.approx(0.11, abs=0.02)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), step_size=st.floats(1e-3, 50), steps=st.integers(0, 6))
@example(seed=311292, step_size=1.0, steps=0)
def test_the_score_never_falls_whatever_the_step(seed: int, step_size: float, steps: int) -> None:
    boxes, gt_boxes = noisy_boxes(40, 12, seed)
    result = refine_boxes(true_iou(gt_boxes), boxes, steps=steps, step_size=step_size)
    assert (result.score >= result.start_score).all()
    torch.testing.assert_close(result.start_score, paired_iou(boxes, gt_boxes), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.score, paired_iou(result.boxes, gt_boxes), rtol=0, atol=1e-5)
    assert torch.equal(result.boxes[~result.moved], boxes[~result.moved])
    assert (result.score[result.moved] > result.start_score[result.moved]).all()
    assert valid_boxes(result.boxes).all()


def test_perfect_boxes_stay_bit_identical() -> None:
    _, gt_boxes = noisy_boxes()
    result = refine_boxes(true_iou(gt_boxes), gt_boxes)
    assert not result.moved.any()
    assert torch.equal(result.boxes, gt_boxes)


# Powers of two scale floats exactly; another factor rounds, and may turn a step that hardly gains into one that loses.
@settings(max_examples=20)
@given(factor=st.sampled_from([8.0, 0.25]), seed=st.integers(0, 1000))
def test_a_scaled_scene_gives_the_scaled_result(factor: float, seed: int) -> None:
    boxes, gt_boxes = noisy_boxes(64, 10, seed)
    small = refine_boxes(true_iou(gt_boxes), boxes).boxes
    large = refine_boxes(true_iou(gt_boxes * factor), boxes * factor).boxes
    assert torch.equal(small * factor, large)


def test_a_box_is_refined_as_it_would_be_alone() -> None:
    boxes, gt_boxes = noisy_boxes(count=8)
    together = refine_boxes(true_iou(gt_boxes), boxes)
    for row in range(8):
        alone = refine_boxes(true_iou(gt_boxes[row : row + 1]), boxes[row : row + 1])
        torch.testing.assert_close(alone.boxes[0], together.boxes[row])


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_steps_cost_one_evaluation_each_and_one_more(steps: int) -> None:
    boxes, gt_boxes = noisy_boxes()
    score, calls = counted(true_iou(gt_boxes))
    result = refine_boxes(score, boxes, steps=steps, tolerance=0.0)
    assert result.forwards == len(calls) == steps + 1
    if not steps:
        assert torch.equal(result.boxes, boxes)
        torch.testing.assert_close(result.score, paired_iou(boxes, gt_boxes))


def test_converged_boxes_leave_the_batch() -> None:
    boxes, gt_boxes = noisy_boxes()
    score, calls = counted(true_iou(gt_boxes))
    refine_boxes(score, boxes, steps=4, tolerance=0.03)
    assert calls[0] == calls[1] == len(boxes)
    assert calls[-1] < len(boxes)
    score, calls = counted(true_iou(gt_boxes))
    result = refine_boxes(score, boxes, steps=50, tolerance=1.0)
    assert (result.score >= result.start_score).all()


def test_a_step_too_long_is_taken_back_and_shrunk() -> None:
    """On -x^2 a step of 1.5 from 1 lands at -2, worse; half of it lands at -0.5, better."""
    boxes = torch.tensor([[0.5, 0, 1.5, 1]])  # centre 1, size 1: relative and absolute shift are the same

    def score(boxes: Tensor, rows: Tensor) -> Tensor:
        return -(((boxes[:, 0] + boxes[:, 2]) / 2) ** 2)

    one = refine_boxes(score, boxes, steps=1, step_size=1.5)
    assert not one.moved.any()
    assert torch.equal(one.boxes, boxes)
    two = refine_boxes(score, boxes, steps=2, step_size=1.5)
    torch.testing.assert_close(two.boxes, torch.tensor([[-1.0, 0, 0, 1]]))
    third = refine_boxes(score, boxes, steps=2, step_size=1.5, shrink=1 / 3)
    torch.testing.assert_close(third.boxes, torch.tensor([[-0.5, 0, 0.5, 1]]))


def test_a_gain_of_no_more_than_min_gain_moves_nothing() -> None:
    boxes, gt_boxes = noisy_boxes()
    free = refine_boxes(true_iou(gt_boxes), boxes)
    gain = free.score - free.start_score
    min_gain = float(gain.median())
    held = refine_boxes(true_iou(gt_boxes), boxes, min_gain=min_gain)
    assert torch.equal(held.moved, gain > min_gain)
    assert torch.equal(held.boxes[~held.moved], boxes[~held.moved])
    assert torch.equal(held.boxes[held.moved], free.boxes[held.moved])
    assert torch.equal(held.score, torch.where(held.moved, free.score, free.start_score))


# ---- refine_boxes, hostile scores. ----


def test_a_nan_score_leaves_its_box_and_disturbs_no_other() -> None:
    boxes, gt_boxes = noisy_boxes(count=6)
    clean = refine_boxes(true_iou(gt_boxes), boxes)
    spoilt = torch.arange(6) == 2

    def score(boxes: Tensor, rows: Tensor) -> Tensor:
        return true_iou(gt_boxes)(boxes, rows) + torch.where(spoilt[rows], NAN, 0.0)

    result = refine_boxes(score, boxes)
    assert torch.isnan(result.score).tolist() == spoilt.tolist()
    assert torch.isnan(result.start_score).tolist() == spoilt.tolist()
    assert not result.moved[2]
    assert torch.equal(result.boxes[2], boxes[2])
    torch.testing.assert_close(result.boxes[~spoilt], clean.boxes[~spoilt])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_step_to_a_score_that_is_not_finite_is_undone_and_counted(value: float) -> None:
    boxes, gt_boxes = noisy_boxes(count=5)

    def score(moved: Tensor, rows: Tensor) -> Tensor:
        stays = (moved == boxes[rows]).all(1)
        return torch.where(stays, true_iou(gt_boxes)(moved, rows), moved.sum(1) * 0 + value)

    boxes = (boxes / 2).round() * 2  # so that decoding the start gives it back exactly
    result = refine_boxes(score, boxes, steps=3)
    assert result.undone == 15
    assert torch.equal(result.boxes, boxes)
    assert torch.equal(result.score, result.start_score)


@pytest.mark.parametrize("slope", [NAN, INF])
def test_a_gradient_that_is_not_finite_moves_nothing(slope: float) -> None:
    boxes, _ = noisy_boxes(count=3)
    result = refine_boxes(lying_slope(slope), boxes)
    assert result.forwards == 1  # there is nowhere to go
    assert torch.equal(result.boxes, boxes)
    assert torch.equal(result.score, result.start_score)


def test_a_score_that_rewards_divergence_still_gets_finite_boxes() -> None:
    boxes, _ = noisy_boxes(count=3)
    result = refine_boxes(lying_slope(1e35), boxes, step_size=1e4)  # overflows to infinity, where the score is highest
    assert torch.isfinite(result.boxes).all()
    assert torch.equal(result.boxes, boxes)
    assert torch.equal(result.score, result.start_score)


@pytest.mark.parametrize("function", [refine_boxes, refine_boxes_paper])
def test_broken_boxes_pass_untouched(function: Callable[..., Refinement]) -> None:
    boxes, gt_boxes = noisy_boxes(count=6)
    boxes[1], boxes[2, 0], boxes[3, 3], boxes[4] = boxes[1, [2, 1, 0, 3]], NAN, INF, 7.0
    score, calls = counted(true_iou(gt_boxes))
    result = function(score, boxes)
    broken = torch.tensor([False, True, True, True, True, False])
    torch.testing.assert_close(result.boxes[broken], boxes[broken], rtol=0, atol=0, equal_nan=True)
    assert result.moved.tolist() == (~broken).tolist()
    assert torch.isnan(result.score).tolist() == broken.tolist()
    assert max(calls) == 2


@pytest.mark.parametrize("function", [refine_boxes, refine_boxes_paper])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 4), torch.full((2, 4), NAN)])
def test_nothing_to_refine_asks_for_no_score(function: Callable[..., Refinement], boxes: Tensor) -> None:
    score, calls = counted(nowhere(0.5))
    result = function(score, boxes)
    assert result.boxes.shape == boxes.shape
    assert not result.moved.any()
    assert result.forwards == len(calls) == 0


# ---- Modes, for both. ----


@pytest.mark.parametrize("output", ["iou", "ranking"])
@pytest.mark.parametrize("function", [refine_boxes, refine_boxes_paper])
def test_same_result_in_every_mode_and_the_input_is_only_read(function: Callable[..., Refinement], output: str) -> None:
    head = IoUHead([3], [8.0], HeadConfig(width=4, hidden=(16,)))
    for layer in (head.iou_output, head.ranking_output):
        torch.nn.init.normal_(layer.weight)
    maps, boxes = torch.randn(1, 3, 12, 12), torch.tensor([[10.0, 12, 60, 70], [3, 3, 40, 90], [0, 0, 96, 96]])
    before = boxes.clone()

    def run() -> Refinement:
        table = head.encode(FeatureMaps((maps * 1,), (8.0,), ((96, 96),)))
        image = torch.zeros(3, dtype=torch.int64)
        return function(lambda moved, rows: getattr(head(table, moved, image[rows]), output), boxes * 1)

    plain = run()
    with torch.no_grad():
        quiet = run()
    with torch.inference_mode():
        inference = run()
    assert plain.moved.any()
    for other in (quiet, inference):
        assert torch.equal(other.boxes, plain.boxes)
        assert torch.equal(other.score, plain.score)
    assert not plain.boxes.requires_grad
    assert all(parameter.grad is None for parameter in head.parameters())
    assert torch.equal(boxes, before)


def test_boxes_keep_their_dtype() -> None:
    boxes, gt_boxes = noisy_boxes(count=4)
    for dtype in (torch.float64, torch.float16):
        result = refine_boxes(true_iou(gt_boxes), boxes.to(dtype))
        assert result.boxes.dtype == dtype
        assert result.score.dtype == torch.float32
        assert result.moved.any()


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (refine_boxes, {"boxes": torch.zeros(3)}, r"`boxes` must have shape \(N, 4\)"),
        (refine_boxes, {"steps": -1}, "`steps` must be at least 0, got -1"),
        (refine_boxes, {"step_size": 0.0}, "`step_size` must be a finite number above 0"),
        (refine_boxes, {"shrink": 1.0}, r"`shrink` must lie in \(0, 1\), got 1.0"),
        (refine_boxes_paper, {"boxes": torch.zeros(3)}, r"`boxes` must have shape \(N, 4\)"),
        (refine_boxes_paper, {"step_size": -0.5}, "`step_size` must be a finite number above 0"),
    ],
)
def test_bad_arguments_are_named(function: Callable[..., Refinement], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**{"score": nowhere(0.5), "boxes": torch.zeros(1, 4), **change})


# ---- refine_boxes_paper. ----


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    side=st.sampled_from([16.0, 128.0]),
    steps=st.integers(0, 6),
    step_size=st.sampled_from([0.5, 2.0, 8.0]),
    early_stop=st.sampled_from([0.0, 0.001, 0.02]),
)
def test_algorithm_2_as_printed(seed: int, side: float, steps: int, step_size: float, early_stop: float) -> None:
    boxes, gt_boxes = noisy_boxes(side, 6, seed)
    boxes, gt_boxes = boxes.double(), gt_boxes.double()
    settings = {"steps": steps, "step_size": step_size, "early_stop": early_stop, "degeneration": -0.01}
    result = refine_boxes_paper(true_iou(gt_boxes), boxes, **settings)
    for row in range(6):

        def score(box: list[float], row: int = row) -> float:
            return float(paired_iou(torch.tensor([box], dtype=torch.float64), gt_boxes[row : row + 1]))

        def gradient(box: list[float], row: int = row) -> list[float]:
            point = torch.tensor([box], dtype=torch.float64, requires_grad=True)
            paired_iou(point, gt_boxes[row : row + 1]).sum().backward()
            assert point.grad is not None
            return [float(value) for value in point.grad[0]]

        (expected,) = refine_paper_reference(score, gradient, [boxes[row].tolist()], **settings)
        torch.testing.assert_close(result.boxes[row], torch.tensor(expected, dtype=torch.float64))


def test_algorithm_2_keeps_the_worse_position_as_printed() -> None:
    boxes, gt_boxes = noisy_boxes(16)
    result = refine_boxes_paper(true_iou(gt_boxes), boxes, step_size=8.0)
    assert (result.score < result.start_score - 0.01).any()
    torch.testing.assert_close(result.score, paired_iou(result.boxes, gt_boxes))


def test_algorithm_2_moves_large_objects_less() -> None:
    gains = []
    for side in (16, 512):
        boxes, gt_boxes = noisy_boxes(side)
        result = refine_boxes_paper(true_iou(gt_boxes), boxes)
        gains.append(float((result.score - result.start_score).mean()))
        assert result.undone == 0
    assert gains[1] < 0.03 < 0.08 < gains[0]


def test_algorithm_2_scores_twice_per_step() -> None:
    boxes, gt_boxes = noisy_boxes()
    score, calls = counted(true_iou(gt_boxes))
    result = refine_boxes_paper(score, boxes, steps=3, early_stop=0.0, degeneration=-1.0)
    assert result.forwards == len(calls) == 6
