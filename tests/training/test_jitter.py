"""Jittered boxes: evenly spread over IoU, with the IoU they really have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.training.jitter import LOWEST_IOU, jitter_boxes
from tests.kit.reference import box_iou


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("low", "high"), [(0.3, 1.0), (0.5, 0.6), (LOWEST_IOU, 1.0), (LOWEST_IOU, 0.1)])
def test_iou_is_uniform(low: float, high: float) -> None:
    count = 20_000
    _, iou = jitter_boxes(torch.tensor([[50.0, 60, 90, 180]]), count, low=low, high=high, generator=seeded())
    place = (iou[0].double().sort().values - low) / (high - low)
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # Kolmogorov and Smirnov: 1.63 / sqrt(n) is exceeded by one uniform sample in a hundred.
    assert float((place - even).abs().max()) < 1.63 / count**0.5
    assert float(place.min()) > -1e-3
    assert float(place.max()) < 1 + 1e-3


def test_directions_are_even_too() -> None:
    box = torch.tensor([[0.0, 0, 10, 40]])
    moved, _ = jitter_boxes(box, 20_000, low=0.5, high=0.9, generator=seeded())
    center = (moved[0, :, :2] + moved[0, :, 2:]) / 2 - torch.tensor([5.0, 20.0])
    size = (moved[0, :, 2:] - moved[0, :, :2]) / torch.tensor([10.0, 40.0])
    for share in ((center > 0).double().mean(0), (size > 1).double().mean(0)):
        torch.testing.assert_close(share, torch.full((2,), 0.5, dtype=torch.float64), rtol=0, atol=0.02)
    spread = (center / torch.tensor([10.0, 40.0])).std(0)
    torch.testing.assert_close(spread[0], spread[1], rtol=0.05, atol=0)


@settings(max_examples=60)
@given(
    x=st.floats(-500, 4000),
    y=st.floats(-500, 4000),
    width=st.floats(0.5, 2000),
    height=st.floats(0.5, 2000),
    low=st.floats(LOWEST_IOU, 1),
    seed=st.integers(0, 99),
)
def test_iou_is_that_of_the_boxes_returned(
    x: float, y: float, width: float, height: float, low: float, seed: int
) -> None:
    box = torch.tensor([[x, y, x + width, y + height]])
    moved, iou = jitter_boxes(box, 5, low=low, generator=seeded(seed))
    assert moved.shape == (1, 5, 4)
    assert moved.dtype == iou.dtype == torch.float32
    original = tuple(box[0].tolist())
    true = torch.tensor([box_iou(original, tuple(other)) for other in moved[0].tolist()])
    torch.testing.assert_close(iou[0], true, rtol=0, atol=1e-7)
    # Corners are rounded to float32: on a box of one pixel far out that moves the IoU a little.
    rounding = 8 * torch.finfo(torch.float32).eps * max(abs(x), abs(y), width, height) / min(width, height)
    assert float(iou.min()) >= low - 1e-5 - rounding


@pytest.mark.parametrize("wanted", [LOWEST_IOU, 0.3, 0.75, 0.999, 1.0])
def test_low_equal_to_high_hits_that_iou(wanted: float) -> None:
    moved, iou = jitter_boxes(torch.tensor([[10.0, 20, 300, 90]]), 200, low=wanted, high=wanted, generator=seeded())
    torch.testing.assert_close(iou, torch.full_like(iou, wanted), rtol=0, atol=2e-6)
    if wanted == 1:
        torch.testing.assert_close(moved[0], torch.tensor([[10.0, 20, 300, 90]]).expand(200, 4), rtol=0, atol=1e-4)


def test_each_box_is_jittered_about_itself() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [500.0, 500, 900, 600]])
    moved, iou = jitter_boxes(boxes, 3, low=0.6, generator=seeded())
    for row in range(2):
        for column in range(3):
            true = box_iou(tuple(boxes[row].tolist()), tuple(moved[row, column].tolist()))
            assert float(iou[row, column]) == pytest.approx(true, abs=1e-6)
            assert true > 0.59


def test_the_generator_decides() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20.0, 30, 90, 70]])
    one, again, other = (jitter_boxes(boxes, 4, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    jitter_boxes(boxes, 4, generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scaled_boxes_move_alike() -> None:
    box = torch.tensor([[16.0, 32, 48, 80]])
    small, _ = jitter_boxes(box, 20, generator=seeded())
    large, _ = jitter_boxes(box * 8, 20, generator=seeded())
    torch.testing.assert_close(small * 8, large)


@pytest.mark.parametrize(("boxes", "count"), [(torch.zeros(0, 4), 3), (torch.tensor([[0.0, 0, 4, 4]]), 0)])
def test_nothing_in_nothing_out(boxes: torch.Tensor, count: int) -> None:
    moved, iou = jitter_boxes(boxes, count)
    assert moved.shape == (len(boxes), count, 4)
    assert iou.shape == (len(boxes), count)


def test_the_input_is_only_read() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    jitter_boxes(boxes, 4, generator=seeded())
    assert boxes.tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.0}, "`low` must be at least 0.02 and at most `high`"),
        ({"low": 0.8, "high": 0.7}, "`low` must be at least .* got low=0.8, high=0.7"),
        ({"high": 1.1}, r"`high` must lie in \[0, 1\], got 1.1"),
        ({"low": float("nan")}, "`low` must lie in"),
        ({"boxes": torch.zeros(4)}, r"`boxes` must have shape \(N, 4\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jitter_boxes(**{"boxes": torch.zeros(1, 4), "count": 1, **change})
