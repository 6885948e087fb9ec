"""Attention over neighbours: against a loop, and what nobody says has no influence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from iou_refiner.siblings.attention import NeighbourAttention, softmax_with_silence
from tests.kit.crowds import opinionated

WIDTH, HEADS, PAIR = 8, 2, 3


def make_attention() -> NeighbourAttention:
    return opinionated(NeighbourAttention(WIDTH, HEADS, PAIR))


def make_input(count: int = 4, others: int = 6, neighbours: int = 5) -> dict[str, Tensor]:
    return {
        "boxes": torch.randn(count, WIDTH),
        "others": torch.randn(others, WIDTH),
        "pairs": torch.randn(count, neighbours, PAIR),
        "index": torch.randint(max(others, 1), (count, neighbours)),
        "present": torch.rand(count, neighbours) < 0.6,
    }


def by_loop(attention: NeighbourAttention, boxes, others, pairs, index, present) -> Tensor:
    """One box, one head and one neighbour at a time."""
    size, rows = WIDTH // HEADS, []
    for q in range(len(boxes)):
        heard = torch.zeros(WIDTH)
        query = attention.query(attention.norm(boxes[q]))
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weights, values = [], []
            for k in range(index.shape[1]):
                if not present[q, k]:
                    continue
                other, pair = others[index[q, k]], pairs[q, k]
                logit = float(query[part] @ attention.key(other)[part]) / math.sqrt(size)
                weights.append(math.exp(logit + float(attention.pair_logits(pair)[head])))
                values.append((attention.value(other) + attention.pair_value(pair))[part])
            for weight, value in zip(weights, values, strict=True):
                heard[part] += weight / (1 + sum(weights)) * value
        rows.append(boxes[q] + attention.output(heard))
    return torch.stack(rows)


@torch.no_grad()
def test_it_is_what_a_loop_says() -> None:
    attention, given = make_attention(), make_input()
    given["present"][1] = False
    torch.testing.assert_close(attention(**given), by_loop(attention, **given))


@torch.no_grad()
def test_a_neighbour_that_is_not_there_has_no_influence() -> None:
    attention, given = make_attention(), make_input()
    before = attention(**given)
    absent = ~given["present"]
    given["pairs"][absent] = 100.0
    given["index"][absent] = (given["index"][absent] + 1) % 6
    assert torch.equal(attention(**given), before)
    given["pairs"][~absent] += 0.5  # while one that is there has
    assert not torch.isclose(attention(**given), before).all(1)[given["present"].any(1)].any()


@torch.no_grad()
def test_where_nobody_is_there_a_box_hears_silence() -> None:
    attention, given = make_attention(), make_input()
    given["present"][:] = False
    expected = given["boxes"] + attention.output(torch.zeros(WIDTH))
    torch.testing.assert_close(attention(**given), expected)


@torch.no_grad()
def test_of_no_boxes_and_of_no_neighbours() -> None:
    attention = make_attention()
    assert attention(**make_input(count=0)).shape == (0, WIDTH)
    assert attention(**make_input(count=0, others=0, neighbours=5)).shape == (0, WIDTH)
    alone = make_input(neighbours=0)
    torch.testing.assert_close(attention(**alone), alone["boxes"] + attention.output(torch.zeros(WIDTH)))


def test_the_weights_and_the_silence_are_one_in_all() -> None:
    present = torch.tensor([[True, True, False], [False, False, False]])
    weight = softmax_with_silence(torch.full((2, 3, 1), 60.0), present)
    torch.testing.assert_close(weight[0, :, 0], torch.tensor([0.5, 0.5, 0]))
    assert (weight[1] == 0).all()
    quiet = softmax_with_silence(torch.zeros(2, 3, 1), present)
    torch.testing.assert_close(quiet.sum(1)[:, 0], torch.tensor([2 / 3, 0]))
