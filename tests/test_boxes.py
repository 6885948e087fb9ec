"""Box functions against scalar arithmetic, and their laws."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.boxes import (
    MAX_LOG_SCALE,
    box_area,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    paired_iou,
    pairwise_iou,
    valid_boxes,
)
from tests.kit.reference import box_iou

NAN, INF = float("nan"), float("inf")
_edge = st.one_of(st.integers(-3, 8).map(float), st.floats(-1000, 1000, width=32))
_any_box = st.tuples(_edge, _edge, _edge, _edge)
_size = st.floats(0.125, 900, width=32)
_valid_box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), _edge, _edge, _size, _size)


def rows(boxes: list[tuple[float, ...]]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@settings(max_examples=60)
@given(st.lists(_any_box, max_size=5), st.lists(_any_box, max_size=5))
def test_iou_is_the_textbooks(a: list[tuple[float, ...]], b: list[tuple[float, ...]]) -> None:
    one, two = rows(a), rows(b)
    iou = pairwise_iou(one, two)
    expected = [[box_iou(tuple(p), tuple(q)) for q in two.tolist()] for p in one.tolist()]
    torch.testing.assert_close(iou, torch.tensor(expected).reshape(len(a), len(b)), rtol=1e-4, atol=1e-6)
    assert ((iou >= 0) & (iou <= 1)).all()
    torch.testing.assert_close(iou, pairwise_iou(two, one).t(), rtol=0, atol=0)


@settings(max_examples=30)
@given(st.lists(st.tuples(_any_box, _any_box), max_size=6))
def test_paired_iou_is_the_diagonal(pairs: list[tuple[tuple[float, ...], tuple[float, ...]]]) -> None:
    a, b = rows([pair[0] for pair in pairs]), rows([pair[1] for pair in pairs])
    assert torch.equal(paired_iou(a, b), pairwise_iou(a, b).diagonal())


@settings(max_examples=30)
@given(_valid_box)
def test_a_box_overlaps_itself_fully(box: tuple[float, ...]) -> None:
    assert paired_iou(rows([box]), rows([box])).item() == 1


def test_iou_is_differentiable() -> None:
    boxes = rows([(0, 0, 4, 4)]).requires_grad_()
    paired_iou(boxes, rows([(1, 0, 5, 4)])).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad[0, 0] > 0
    assert boxes.grad[0, 2] > 0


def test_area_of_empty_and_inverted_boxes_is_zero() -> None:
    boxes = rows([(0, 0, 2, 3), (5, 5, 5, 9), (4, 0, 1, 3), (4, 4, 1, 1)])
    assert box_area(boxes).tolist() == [6, 0, 0, 0]
    assert not pairwise_iou(boxes[1:], boxes).any()


@settings(max_examples=40)
@given(st.lists(_any_box, max_size=5), st.integers(0, 500), st.integers(0, 500))
def test_clipping(boxes: list[tuple[float, ...]], height: int, width: int) -> None:
    before = rows(boxes)
    clipped = clip_boxes(before, (height, width))
    expected = [
        [min(max(v, 0.0), limit) for v, limit in zip(box, (width, height) * 2, strict=True)] for box in before.tolist()
    ]
    assert torch.equal(clipped, rows(expected))  # type: ignore[arg-type]
    assert torch.equal(clip_boxes(clipped, (height, width)), clipped)
    assert torch.equal(before, rows(boxes))


def test_valid_boxes_are_finite_and_not_empty() -> None:
    boxes = rows(
        [(0, 0, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0), (2, 0, 1, 1), (NAN, 0, 1, 1), (0, 0, INF, 1), (-INF, 0, 1, 1)]
    )
    assert valid_boxes(boxes).tolist() == [True, *[False] * 6]


@settings(max_examples=60)
@given(_valid_box, _valid_box)
def test_decoding_inverts_encoding(box: tuple[float, ...], other: tuple[float, ...]) -> None:
    boxes, reference = rows([box]).double(), rows([other]).double()
    deltas = encode_boxes(boxes, reference)
    if deltas[:, 2:].abs().max() < MAX_LOG_SCALE:
        torch.testing.assert_close(decode_boxes(deltas, reference), boxes, rtol=0, atol=1e-8)
    assert not encode_boxes(reference, reference).any()
    torch.testing.assert_close(decode_boxes(torch.zeros_like(reference), reference), reference, rtol=0, atol=1e-9)


@given(st.lists(_valid_box, min_size=1, max_size=5))
def test_deltas_of_zero_give_the_same_bits(boxes: list[tuple[float, ...]]) -> None:
    reference = rows(boxes)
    assert torch.equal(decode_boxes(torch.zeros_like(reference), reference), reference)


def test_what_the_four_coordinates_mean() -> None:
    reference = rows([(10, 20, 30, 60)])
    moved = decode_boxes(torch.tensor([[0.5, -0.25, 0, torch.log(torch.tensor(2.0))]]), reference)
    torch.testing.assert_close(moved, rows([(20, -10, 40, 70)]))


@settings(max_examples=30)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4))
def test_any_finite_deltas_decode_to_a_valid_box(deltas: list[float]) -> None:
    assert valid_boxes(decode_boxes(torch.tensor([deltas], dtype=torch.float64), rows([(0, 0, 10, 20)]).double())).all()


def test_nothing_in_nothing_out() -> None:
    none = torch.zeros(0, 4)
    assert pairwise_iou(none, torch.zeros(3, 4)).shape == (0, 3)
    assert paired_iou(none, none).shape == box_area(none).shape == valid_boxes(none).shape == (0,)
    assert clip_boxes(none, (5, 5)).shape == encode_boxes(none, none).shape == decode_boxes(none, none).shape == (0, 4)
