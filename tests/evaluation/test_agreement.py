"""The predicted IoU against the true one: what the definitions say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.evaluation.agreement import agreement


def slow_ranks(values: list[float]) -> list[float]:
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


fractions = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


@settings(deadline=None, max_examples=60)
@given(fractions)
def test_agreement_is_what_the_definitions_say(pairs):
    predicted, true = (np.array([pair[side] for pair in pairs], float) / 8 for side in (0, 1))
    measured = agreement(predicted, true, above=0.5)
    judged = [(p, t) for p, t in zip(predicted.tolist(), true.tolist(), strict=True) if t > 0.5]
    assert measured.count == len(judged)

    def pearson(a: list[float], b: list[float]) -> float:
        a, b = np.array(a) - np.mean(a), np.array(b) - np.mean(b)
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    sides = [list(side) for side in zip(*judged, strict=True)]
    if any(len(set(side)) < 2 for side in sides) or not sides:
        assert math.isnan(measured.pearson)
        assert math.isnan(measured.spearman)
        return
    assert measured.pearson == pytest.approx(pearson(*sides), abs=1e-9)
    assert measured.spearman == pytest.approx(pearson(*map(slow_ranks, sides)), abs=1e-9)
    assert measured.mean_absolute_error == pytest.approx(np.mean([abs(p - t) for p, t in judged]))


def test_spearman_sees_order_alone_and_pearson_the_line():
    true = np.linspace(0.51, 1, 20)
    curved = agreement(true**9, true)
    assert curved.spearman == pytest.approx(1)
    assert curved.pearson < 0.95
    assert agreement(1 - true, true).pearson == pytest.approx(-1)
    assert agreement(true - 0.1, true).mean_absolute_error == pytest.approx(0.1)


def test_agreement_without_variance_or_pairs_is_none_in_json():
    for predicted, true in (([0.3, 0.3], [0.6, 0.7]), ([0.1], [0.9]), ([], []), ([0.5, 0.6], [0.2, np.nan])):
        plain = json.loads(json.dumps(agreement(np.array(predicted), np.array(true)).to_dict(), allow_nan=False))
        assert plain["pearson"] is None
        assert plain["spearman"] is None
        assert (plain["mean_absolute_error"] is None) == (plain["count"] == 0)


def test_pairs_that_are_none_are_refused():
    half = np.array([0.5, 0.5])
    with pytest.raises(ValueError, match=r"`predicted` and `true` must both have shape \(n,\), got \(1,\) and \(2,\)"):
        agreement(half[:1], half)
    with pytest.raises(ValueError, match=r"must both have shape \(n,\), got \(1, 2\)"):
        agreement(half[None], half[None])
    with pytest.raises(ValueError, match=r"`predicted` must lie in \[0, 1\], got nan at index 1"):
        agreement(np.array([0.5, np.nan]), half)
    with pytest.raises(ValueError, match=r"`predicted` must lie in \[0, 1\], got 1.5 at index 0"):
        agreement(np.array([1.5, 0.5]), half)
    with pytest.raises(ValueError, match=r"`true` must lie in \[0, 1\], got -0.5 at index 0"):
        agreement(half, np.array([-0.5, 0.5]))
