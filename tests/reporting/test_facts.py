"""What a report states: the numbers of eval, no movement where nothing moved, and the verdict by its rules."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.checks import DataError
from iou_refiner.coco import Results
from iou_refiner.evaluation.bootstrap import Comparison, compare
from iou_refiner.reporting.facts import THRESHOLDS, measure
from iou_refiner.reporting.fit import calibrate, fit
from iou_refiner.reporting.gallery import best_score, most_changed
from iou_refiner.reporting.verdict import verdict_of
from tests.kit.scenes import make_results, make_truth, scene, seeds

CASES = settings(deadline=None, max_examples=15)


@CASES
@given(seed=seeds, ties=st.booleans())
def test_the_comparison_is_that_of_eval(seed: int, ties: bool):
    truth, before = scene(seed, ties=ties)
    after = Results(before.image_id, before.category_id, before.bbox, before.score[::-1].copy())
    facts = measure(before, after, truth, resamples=20, seed=3)
    assert facts.comparison.to_dict() == compare(before, after, truth, resamples=20, seed=3).to_dict()
    at = dict(zip(THRESHOLDS, facts.after.ap_at, strict=True))
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75), ("AP90", 0.9)):
        np.testing.assert_allclose(at[threshold], facts.comparison.after.metrics[name], atol=1e-12)


@CASES
@given(seed=seeds)
def test_the_same_file_twice_moves_nothing(seed: int):
    truth, results = scene(seed, ties=False)
    facts = measure(results, results, truth, resamples=5)
    assert facts.to_dict()["before"]["errors"] == facts.to_dict()["after"]["errors"]
    np.testing.assert_array_equal(facts.before.ap_of_image, facts.after.ap_of_image)
    assert most_changed(facts) == ([], [])
    assert facts.verdict.level in ("none", "unclear")
    assert facts.verdict.level == "none" or not facts.objects


@CASES
@given(seed=seeds)
def test_everything_survives_json(seed: int):
    truth, results = scene(seed, ties=True)
    text = json.dumps(measure(results, results[:0], truth, resamples=3).to_dict(), allow_nan=False)
    assert json.loads(text)["comparison"]["resamples"] == 3


def test_results_of_other_images_are_refused_by_name():
    truth, good = make_truth([1], [1], [(1, 1, (1, 1, 9, 9), False)]), make_results([(1, 1, (1, 1, 9, 9), 0.5)])
    with pytest.raises(DataError, match=r"`after`: record 1 \(image 7\).*must occur in the ground truth"):
        measure(good, make_results([(7, 1, (1, 1, 9, 9), 0.5)]), truth)
    with pytest.raises(ValueError, match=r"`resamples` must lie in \[0, 100000\]"):
        measure(good, good, truth, resamples=100_001)


# --- score against the truth -----------------------------------------------------------------------------------------


@CASES
@given(seed=seeds)
def test_every_judged_box_is_in_one_bin_and_one_cell(seed: int):
    rng = np.random.default_rng(seed)
    value, true = rng.choice([0, 0.1, 0.55, 1, 0.3], 40), rng.uniform(0, 1, 40)
    true[:7] = np.nan
    fitted = fit("score", value, true, rng.random(40) < 0.5)
    assert fitted is not None
    assert sum(entry.count for entry in fitted.bins) == fitted.cells.sum() == 33
    for entry in fitted.bins:
        here = (value >= entry.low) & ((value < entry.high) | (entry.high == 1)) & ~np.isnan(true)
        assert entry.count == here.sum()
        if entry.count:
            assert entry.mean == pytest.approx(true[here].mean())
            assert entry.value == pytest.approx(value[here].mean())


def test_a_calibrated_score_has_no_error_and_an_overconfident_one_has_its_excess():
    hit = np.array([True] * 8 + [False] * 2)
    right, wrong = calibrate(np.full(10, 0.8), hit), calibrate(np.full(10, 0.99), hit)
    assert right is not None
    assert wrong is not None
    assert right.error == pytest.approx(0)
    assert wrong.error == pytest.approx(0.19)


def test_scores_beyond_one_have_neither_fit_nor_calibration():
    assert calibrate(np.array([0.5, 1.5]), np.array([True, False])) is None
    assert fit("score", np.array([0.5, -0.5]), np.zeros(2), np.zeros(2, bool)) is None


def test_the_best_score_is_where_f1_is_best():
    truth, results = scene(5, ties=True)
    side = measure(results, results, truth, resamples=0).before
    counted = ~side.matching.ignored[0]
    score, hit, objects = side.matching.score[counted], side.matching.hit[0][counted], side.matching.judged.sum()

    def f1(bar: float) -> float:
        return 2 * hit[score >= bar].sum() / ((score >= bar).sum() + objects)

    assert f1(best_score(side)) == pytest.approx(max(f1(bar) for bar in score))


# --- the verdict -----------------------------------------------------------------------------------------------------


def comparison(ap: tuple[float, float], ap50: tuple[float, float] = (-0.01, 0.02), images: int = 500) -> Comparison:
    """A comparison with these intervals, and differences in the middle of them."""
    truth = make_truth([1], [1], [(1, 1, (1, 1, 9, 9), False)])
    base = compare(make_results(), make_results(), truth, resamples=0)
    intervals = {**base.intervals, "AP": ap, "AP50": ap50}
    metrics = {**base.before.metrics, **dict.fromkeys(intervals, 0.4)}
    new = {**metrics, "AP": 0.4 + sum(ap) / 2, "AP50": 0.4 + sum(ap50) / 2}
    before = replace(base.before, metrics=metrics, images=images)
    return Comparison(before, replace(base.after, metrics=new, images=images), intervals, 1000, 0)


@pytest.mark.parametrize(
    ("given", "level", "trust", "reason"),
    [
        (comparison((0.03, 0.05)), "gain", "A gain to trust", "lies above 0"),
        (comparison((0.03, 0.05), images=99), "unclear", "measured on few images", "99 images were measured, fewer"),
        (comparison((0.03, 0.05), (-0.04, -0.01)), "unclear", "with a price", "is lower, -2.5 [-4.0, -1.0]"),
        (comparison((-0.01, 0.03)), "unclear", "may be chance", "on both sides of 0"),
        (comparison((-0.05, -0.03)), "loss", "a loss", "lies below 0"),
        (comparison((0.03, 0.05), (0.01, 0.02)), "gain", "A gain to trust", "rose too"),
    ],
)
def test_the_verdict_goes_by_its_rules(given: Comparison, level: str, trust: str, reason: str):
    verdict = verdict_of(given)
    assert verdict.level == level
    assert trust in verdict.trust
    assert reason in " ".join(verdict.reasons)


def test_the_gain_is_one_sentence_with_its_interval():
    assert verdict_of(comparison((0.031, 0.047))).gain == "AP 40.0 → 43.9, +3.9 [+3.1, +4.7] on 500 images"


def test_without_resamples_nothing_is_said_to_be_beyond_chance():
    verdict = verdict_of(comparison((float("nan"), float("nan"))))
    assert verdict.level == "unclear"
