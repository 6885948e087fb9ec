"""The predicted IoU against the true one: what the definitions say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from iou_refiner.evaluation.agreement import calibration, ranking, true_iou
from tests.kit.scenes import make_results, make_truth, scene, seeds


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_true_iou_is_the_best_of_the_same_image_and_category(seed):
    truth, results = scene(seed, ties=False)
    found = true_iou(results, truth)
    for i, value in enumerate(found):
        near = (truth.image_id == results.image_id[i]) & (truth.category_id == results.category_id[i])
        overlap = [0.0, 0.0]  # with an object, and with a crowd region
        for j in np.flatnonzero(near):
            kind = int(truth.iscrowd[j])
            iou = mask.iou(results.bbox[i : i + 1], truth.bbox[j : j + 1], [kind])[0, 0]
            overlap[kind] = max(overlap[kind], iou)
        judged = overlap[1] < 0.5 or overlap[1] <= overlap[0]
        assert value == pytest.approx(overlap[0] if judged else math.nan, abs=1e-9, nan_ok=True)


def test_what_a_crowd_covers_is_not_judged():
    crowd = (1, 1, [0, 0, 100, 100], True)
    truth = make_truth([1], [1, 2], [crowd, (1, 1, [0, 0, 20, 10], False)])
    inside, on_object, outside, other = [60, 60, 10, 10], [0, 0, 20, 10], [90, 0, 100, 100], [60, 60, 10, 10]
    records = [(1, 1, inside, 0.5), (1, 1, on_object, 0.5), (1, 1, outside, 0.5), (1, 2, other, 0.5)]
    np.testing.assert_array_equal(true_iou(make_results(records), truth), [np.nan, 1, 0, 0])


def test_empty_boxes_overlap_nothing():
    truth = make_truth([1, 2], [1], [(1, 1, [5, 5, 0, 0], False), (1, 1, [5, 5, 0, 9], True)])
    found = true_iou(make_results([(1, 1, [5, 5, 0, 0], 0.5), (2, 1, [5, 5, 1, 1], 0.5)]), truth)
    np.testing.assert_array_equal(found, [0, 0])


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


fractions = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


@settings(deadline=None, max_examples=60)
@given(fractions)
def test_ranking_is_what_the_definitions_say(pairs):
    predicted, true = (np.array([pair[side] for pair in pairs], float) / 8 for side in (0, 1))
    found = ranking(predicted, true, above=0.5)
    kept = [(p, t) for p, t in zip(predicted.tolist(), true.tolist(), strict=True) if t > 0.5]
    assert found.count == len(kept)

    def pearson(a: list[float], b: list[float]) -> float:
        a, b = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    sides = [list(side) for side in zip(*kept, strict=True)]
    if any(len(set(side)) < 2 for side in sides) or not sides:
        assert math.isnan(found.pearson)
        assert math.isnan(found.spearman)
        return
    assert found.pearson == pytest.approx(pearson(*sides), abs=1e-9)
    assert found.spearman == pytest.approx(pearson(*map(slow_ranks, sides)), abs=1e-9)
    assert found.mean_absolute_error == pytest.approx(np.mean([abs(p - t) for p, t in kept]))


def test_spearman_sees_order_alone_and_pearson_the_line():
    true = np.linspace(0.51, 1, 20)
    curved = ranking(true**9, true)
    assert curved.spearman == pytest.approx(1)
    assert curved.pearson < 0.95
    assert ranking(1 - true, true).pearson == pytest.approx(-1)
    assert ranking(true - 0.1, true).mean_absolute_error == pytest.approx(0.1)


def test_ranking_without_variance_or_pairs_is_none_in_json():
    for predicted, true in (([0.3, 0.3], [0.6, 0.7]), ([0.1], [0.9]), ([], []), ([0.5, 0.6], [0.2, np.nan])):
        plain = json.loads(json.dumps(ranking(np.array(predicted), np.array(true)).to_dict(), allow_nan=False))
        assert plain["pearson"] is None
        assert plain["spearman"] is None
        assert (plain["mean_absolute_error"] is None) == (plain["count"] == 0)


def test_calibration_by_hand():
    predicted = np.array([0.0, 0.1, 0.3, 0.5, 1.0, 0.9])
    true = np.array([0.2, 0.0, 0.5, 0.5, 0.8, np.nan])  # the last is not judged
    found = calibration(predicted, true, bins=2)
    low, high = found.bins
    assert (low.low, low.high, low.count) == (0.0, 0.5, 3)
    assert (high.low, high.high, high.count) == (0.5, 1.0, 2)
    assert (low.predicted, low.true) == (pytest.approx(0.4 / 3), pytest.approx(0.7 / 3))
    assert (high.predicted, high.true) == (pytest.approx(0.75), pytest.approx(0.65))
    assert found.error == pytest.approx((3 * 0.1 + 2 * 0.1) / 5)


@settings(deadline=None, max_examples=40)
@given(fractions, st.integers(1, 12))
def test_calibration_bins_hold_every_pair_once_and_in_place(pairs, bins):
    predicted, true = (np.array([pair[side] for pair in pairs], float) / 8 for side in (0, 1))
    found = calibration(predicted, true, bins=bins)
    assert sum(part.count for part in found.bins) == len(pairs)
    for part in found.bins:
        if part.count:
            assert part.low - 1e-12 <= part.predicted <= part.high + 1e-12
        else:
            assert math.isnan(part.predicted)
    if pairs:
        assert calibration(true, true, bins=bins).error == pytest.approx(0, abs=1e-12)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("measure", [ranking, calibration])
def test_pairs_that_are_none_are_refused(measure):
    half = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match=r"`predicted` and `true` must both have shape \(n,\), got \(1,\) and \(2,\)"):
        measure(half[:1], half)
    with pytest.raises(ValueError, match=r"must both have shape \(n,\), got \(1, 2\)"):
        measure(half[None], half[None])
    with pytest.raises(ValueError, match=r"`predicted` must lie in \[0, 1\], got nan at index 1"):
        measure(np.array([0.5, np.nan]), half)
    with pytest.raises(ValueError, match=r"`predicted` must lie in \[0, 1\], got 1.5 at index 0"):
        measure(np.array([1.5, 0.5]), half)
    with pytest.raises(ValueError, match=r"`true` must lie in \[0, 1\], got -0.5 at index 0"):
        measure(half, np.array([-0.5, 0.5]))
    with pytest.raises(ValueError, match="`bins` must be a finite number above 0"):
        calibration(half, half, bins=0)
