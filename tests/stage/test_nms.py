"""Suppression against slow oracles, and by its laws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iou_refiner.boxes import valid_boxes
from iou_refiner.stage import greedy_numpy, greedy_torch
from iou_refiner.stage.nms import iou_guided_nms, nms
from iou_refiner.stage.soft_nms import soft_nms
from tests.kit.reference import box_iou, iou_guided_nms_reference, soft_nms_reference

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, scope="module", params=["on the CPU", "on a device"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test below holds for both implementations: in numpy, and in the torch operators that a device takes."""

    def on_device(boxes: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
        return greedy_torch.owners(torch.tensor(boxes), torch.tensor(labels), threshold).numpy()

    def order_on_device(rank: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return greedy_torch.order(torch.tensor(rank), torch.tensor(scores)).numpy()

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "on a device":
            patch.setattr(greedy_numpy, "order", order_on_device)
            patch.setattr(greedy_numpy, "owners", on_device)
        yield


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pairs whose IoU is looked at, call by call."""
    pairs: list[int] = []
    in_numpy, in_torch = greedy_numpy.iou_of_corners, greedy_torch.paired_iou
    monkeypatch.setattr(greedy_numpy, "iou_of_corners", lambda *args: pairs.append(len(args[4])) or in_numpy(*args))
    monkeypatch.setattr(greedy_torch, "paired_iou", lambda *args: pairs.append(len(args[0])) or in_torch(*args))
    return pairs


# Corners on a coarse grid: many equal boxes, touching edges, empty boxes, and IoUs that meet a threshold exactly.
_grid = st.integers(0, 6).map(float)
_box = st.one_of(
    st.tuples(_grid, _grid, _grid, _grid),
    st.tuples(_grid, _grid, st.floats(0.1, 6), st.floats(0.1, 6)).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])),
    st.sampled_from([(-1e30, 0.0, 0.0, 1.0), (0.0, 0.0, 1e30, 1e30), (NAN, 0.0, 2.0, 2.0), (0.0, 0.0, INF, 2.0)]),
)
_score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
_row = st.tuples(_box, _score, _score, st.integers(0, 2))
_threshold = st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0])


def columns(rows: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    boxes, scores, ranking, labels = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    return (
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(ranking, dtype=torch.float32),
        torch.tensor(labels, dtype=torch.int64),
    )


def random_boxes(count: int, seed: int = 0, *, field: float = 100, size: float = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * field
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * size + 1], 1)


def clusters(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores, ranking = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    return random_boxes(count, seed), scores, ranking, torch.randint(0, 3, (count,), generator=generator)


# ---- IoU-guided NMS. ----


@settings(max_examples=200)
@given(rows=st.lists(_row, max_size=14), threshold=_threshold)
def test_algorithm_1_as_printed(rows: list[Any], threshold: float) -> None:
    boxes, scores, ranking, labels = columns(rows)
    keep, merged = iou_guided_nms(boxes, scores, ranking, labels, threshold=threshold)
    rounded = [tuple(box) for box in boxes.tolist()]  # the float32 values, as the package sees them
    expected = iou_guided_nms_reference(rounded, scores.tolist(), ranking.tolist(), labels.tolist(), threshold)
    assert list(zip(keep.tolist(), merged.tolist(), strict=True)) == expected


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_algorithm_1_on_crowded_boxes(threshold: float) -> None:
    boxes, scores, ranking, labels = clusters()
    keep, merged = iou_guided_nms(boxes, scores, ranking, labels, threshold=threshold)
    rounded = [tuple(box) for box in boxes.tolist()]
    expected = iou_guided_nms_reference(rounded, scores.tolist(), ranking.tolist(), labels.tolist(), threshold)
    assert list(zip(keep.tolist(), merged.tolist(), strict=True)) == expected


def test_the_best_fitting_box_takes_the_best_score() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    keep, merged = iou_guided_nms(boxes, torch.tensor([0.9, 0.4, 0.3]), torch.tensor([0.6, 0.8, 0.7]))
    assert keep.tolist() == [1, 2]
    torch.testing.assert_close(merged, torch.tensor([0.9, 0.3]))


def test_a_box_suppressed_by_two_gives_its_score_to_the_better_placed() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])  # the middle one overlaps both others
    keep, merged = iou_guided_nms(boxes, torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.8, 0.5, 0.7]), threshold=0.3)
    assert keep.tolist() == [0, 2]
    torch.testing.assert_close(merged, torch.tensor([0.9, 0.2]))


def test_an_overlap_of_exactly_the_threshold_suppresses_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 3, 1], [1, 0, 4, 1]])  # 2 of 4
    ranks = torch.tensor([0.9, 0.8])
    assert len(nms(boxes, ranks, threshold=0.5)) == 2
    assert len(nms(boxes, ranks, threshold=0.4999)) == 1


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0, 1))
def test_laws_of_iou_guided_nms(seed: int, threshold: float) -> None:
    boxes, scores, ranking, labels = clusters(60, seed)
    keep, merged = iou_guided_nms(boxes, scores, ranking, labels, threshold=threshold)
    assert (merged >= scores[keep]).all()
    assert ranking[keep].tolist() == sorted(ranking[keep].tolist(), reverse=True)
    assert len(set(keep.tolist())) == len(keep)
    assert int(ranking.argmax()) in keep
    # Shuffled rows, the same boxes in the same order.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    other, also = iou_guided_nms(boxes[order], scores[order], ranking[order], labels[order], threshold=threshold)
    assert torch.equal(order[other], keep)
    assert torch.equal(also, merged)
    # Each class alone, the same boxes.
    for label in range(3):
        rows = torch.nonzero(labels == label).flatten()
        alone, score = iou_guided_nms(boxes[rows], scores[rows], ranking[rows], threshold=threshold)
        assert torch.equal(rows[alone], keep[labels[keep] == label])
        assert torch.equal(score, merged[labels[keep] == label])


def test_detections_overlap_no_other_so_a_second_pass_changes_nothing() -> None:
    boxes, scores, ranking, labels = clusters()
    keep, merged = iou_guided_nms(boxes, scores, ranking, labels)
    again, same = iou_guided_nms(boxes[keep], merged, ranking[keep], labels[keep])
    assert torch.equal(again, torch.arange(len(keep)))
    assert torch.equal(same, merged)


def test_ties_go_to_the_score_and_then_to_the_first() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    ranking = torch.tensor([0.5, 0.7, 0.7, 0.7, 0.7])
    keep, merged = iou_guided_nms(boxes, torch.tensor([0.9, 0.1, 0.3, 0.3, 0.2]), ranking)
    assert keep.tolist() == [2]
    assert merged.tolist() == [pytest.approx(0.9)]
    assert nms(boxes, torch.full((5,), 0.5)).tolist() == [0]


@pytest.mark.parametrize(
    "broken", [(NAN, 0.0, 9.0, 9.0), (0.0, 0.0, INF, 9.0), (3.0, 3.0, 3.0, 8.0), (9.0, 9.0, 1.0, 1.0)]
)
def test_a_broken_box_meets_nobody(broken: Any) -> None:
    boxes = torch.tensor([broken, (0.0, 0, 9, 9), broken])
    keep, merged = iou_guided_nms(boxes, torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.9, 0.8, 0.7]), threshold=0.0)
    assert keep.tolist() == [0, 1, 2]
    torch.testing.assert_close(merged, torch.tensor([0.3, 0.2, 0.1]))


@pytest.mark.parametrize("far", [(-1e30, 0.0, -1e29, 1.0), (1e29, 0.0, 1e30, 1.0), (-3e38, -3e38, 3e38, 3e38)])
def test_a_diverged_box_hides_no_other_pair(far: Any) -> None:
    pair = [(10.0, 10, 50, 50), (11.0, 10, 51, 50)]
    boxes, labels = torch.tensor([*pair, *pair, far]), torch.tensor([0, 0, 1, 1, 2])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), labels).tolist() == [0, 2, 4]


def test_nothing_in_nothing_out() -> None:
    none = torch.zeros(0)
    keep, merged = iou_guided_nms(torch.zeros(0, 4), none, none)
    assert (keep.shape, merged.shape, keep.dtype) == ((0,), (0,), torch.int64)
    assert nms(torch.zeros(0, 4), none).shape == (0,)
    assert [part.shape for part in soft_nms(torch.zeros(0, 4), none)] == [(0,), (0,)]


def test_the_input_is_only_read() -> None:
    arguments = clusters()
    before = [argument.clone() for argument in arguments]
    iou_guided_nms(*arguments)
    soft_nms(arguments[0], arguments[1], arguments[3])
    assert all(map(torch.equal, arguments, before))


# ---- The baselines. ----


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 120), threshold=st.sampled_from([0.1, 0.5, 0.77]))
def test_greedy_nms_is_torchvisions(seed: int, count: int, threshold: float) -> None:
    from torchvision.ops import batched_nms

    boxes, scores, _, labels = clusters(count, seed)
    assert torch.equal(nms(boxes, scores, labels, threshold=threshold), batched_nms(boxes, scores, labels, threshold))


@settings(max_examples=80)
@given(rows=st.lists(_row, max_size=12), threshold=_threshold, method=st.sampled_from(["gaussian", "linear"]))
def test_soft_nms_is_the_naive_loop(rows: list[Any], threshold: float, method: str) -> None:
    boxes, scores, _, labels = columns(rows)
    keep, new = soft_nms(boxes, scores, labels, method=method, threshold=threshold, sigma=0.4, min_score=0.05)

    def decay(iou: float) -> float:
        if method == "gaussian":
            return math.exp(-(iou**2) / 0.4)
        return 1 - iou if iou > threshold else 1.0

    rounded = [tuple(box) for box in boxes.tolist()]
    expected = torch.tensor(soft_nms_reference(rounded, scores.tolist(), labels.tolist(), decay, 0.05))
    assert sorted(keep.tolist()) == torch.nonzero(expected >= 0.05).flatten().tolist()
    torch.testing.assert_close(new, expected[keep].float(), rtol=1e-5, atol=0)
    assert new.tolist() == sorted(new.tolist(), reverse=True)


def test_soft_nms_on_crowded_boxes() -> None:
    boxes, scores, _, labels = clusters(150)
    keep, new = soft_nms(boxes, scores, labels)
    rounded = [tuple(box) for box in boxes.tolist()]
    expected = soft_nms_reference(
        rounded, scores.tolist(), labels.tolist(), lambda iou: math.exp(-(iou**2) / 0.5), 1e-3
    )
    torch.testing.assert_close(new, torch.tensor(expected)[keep], rtol=1e-4, atol=0)
    assert len(keep) == sum(value >= 1e-3 for value in expected)


# ---- Size. ----


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), budget=st.sampled_from([1, 7, 100]), threshold=_threshold)
def test_deciding_a_few_boxes_at_a_time_changes_nothing(seed: int, count: int, budget: int, threshold: float) -> None:
    boxes, scores, ranking, labels = clusters(count, seed)
    rows = [tuple(box) for box in boxes.tolist()]
    expected = iou_guided_nms_reference(rows, scores.tolist(), ranking.tolist(), labels.tolist(), threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_numpy, "_CHUNK_PAIRS", budget)
        patch.setattr(greedy_torch, "_CHUNK_PAIRS", budget)
        keep, merged = iou_guided_nms(boxes, scores, ranking, labels, threshold=threshold)
    assert list(zip(keep.tolist(), merged.tolist(), strict=True)) == expected


@settings(max_examples=100)
@given(rows=st.lists(_row, min_size=1, max_size=20), threshold=_threshold)
def test_every_partner_lies_in_the_window(rows: list[Any], threshold: float) -> None:
    boxes, _, _, labels = columns(rows)
    sound = torch.nonzero(valid_boxes(boxes)).flatten().numpy()
    low, high = np.split(boxes[sound].double().numpy().T, 2)
    with np.errstate(over="ignore"):
        order, begin, end = greedy_numpy.windows(low, high, labels[sound].numpy(), threshold)
    in_torch = tuple(part.numpy() for part in greedy_torch.windows(boxes, labels, threshold))
    for placed, first, last in ((sound[order], begin, end), in_torch):
        for place, row in enumerate(placed):
            partners = {
                other
                for other in range(len(boxes))
                if labels[other] == labels[row]
                and box_iou(tuple(boxes[row].tolist()), tuple(boxes[other].tolist())) > threshold
            }
            assert partners <= set(placed[first[place] : last[place]])


def test_equal_boxes_are_not_all_paired(tested: list[int]) -> None:
    boxes, ranks = torch.tensor([[3.0, 4, 50, 60]]).repeat(20_000, 1), torch.linspace(0, 1, 20_000)
    keep, merged = iou_guided_nms(boxes, ranks.flip(0), ranks)
    assert keep.tolist() == [19_999]
    assert merged.tolist() == [1.0]
    assert sum(tested) <= 10 * 20_000


def test_twenty_thousand_scattered_boxes_need_no_matrix(tested: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (greedy_numpy, greedy_torch):
        monkeypatch.setattr(module, "_CHUNK_PAIRS", 100_000)
    boxes = random_boxes(20_000, field=20_000, size=30)
    ranks = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    keep, _ = iou_guided_nms(boxes, ranks, ranks.flip(0))
    assert 15_000 < len(keep) <= 20_000
    assert max(tested) <= 100_000 + 20_000  # at once
    assert sum(tested) < 20_000**2 / 500  # in all


def test_a_long_chain_of_neighbours() -> None:
    start = torch.arange(2000.0)
    boxes = torch.stack([start, 0 * start, start + 2, 0 * start + 1], 1)  # each overlaps the next by a third
    assert nms(boxes, -start, threshold=0.3).tolist() == list(range(0, 2000, 2))


# ---- Errors. ----

BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"boxes": torch.zeros(2, 5)}, ValueError, r"`boxes` must have shape \(N, 4\)"),
    ({"boxes": torch.zeros(2, 4).long()}, TypeError, "`boxes` must be floating point"),
    ({"scores": torch.zeros(3)}, ValueError, r"`scores` must have shape \(2,\) to match `boxes`, got \(3,\)"),
    ({"scores": torch.tensor([0.5, NAN])}, ValueError, "`scores` holds NaN, which cannot be ranked"),
    ({"labels": torch.zeros(1).long()}, ValueError, "`labels` must have shape"),
    ({"threshold": 1.5}, ValueError, r"`threshold` must lie in \[0, 1\], got 1.5"),
    ({"threshold": NAN}, ValueError, "`threshold` must lie in"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"boxes": torch.zeros(2, 4), "scores": torch.zeros(2), **change}
    for function in (nms, soft_nms):
        with pytest.raises(error, match=message):
            function(**arguments)
    with pytest.raises(error, match=message):
        iou_guided_nms(ranking=torch.zeros(2), **arguments)


def test_a_ranking_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="`ranking` holds NaN, which cannot be ranked"):
        iou_guided_nms(torch.zeros(1, 4), torch.zeros(1), torch.tensor([NAN]))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"method": "gausian"}, "Did you mean 'gaussian'"), ({"sigma": 0.0}, "`sigma` must be a finite number above 0")],
)
def test_bad_settings_of_soft_nms_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_nms(torch.zeros(1, 4), torch.zeros(1), **change)
