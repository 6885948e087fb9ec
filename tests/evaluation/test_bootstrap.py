"""The interval is that of measuring every resample, and its tables say what was measured."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.coco import GroundTruth, Results
from iou_refiner.evaluation import resampling
from iou_refiner.evaluation.ap import METRICS, evaluate, match
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.evaluation.resampling import curves, resample, resampled_metrics, weighted_metrics
from tests.kit.scenes import make_results, make_truth, scene, seeds


def repeated(truth: GroundTruth, results: Results, weights: np.ndarray) -> tuple[GroundTruth, Results]:
    """The data set in which image ``i`` really stands ``weights[i]`` times, under new ids."""
    images, annotations, records = [], [], []
    for image, weight in zip(truth.images, weights, strict=True):
        for _ in range(weight):
            images.append(len(images))
            for i in np.flatnonzero(truth.image_id == image.id):
                annotations.append((images[-1], truth.category_id[i], truth.bbox[i], truth.iscrowd[i]))
            for i in np.flatnonzero(results.image_id == image.id):
                records.append((images[-1], results.category_id[i], results.bbox[i], results.score[i]))
    return make_truth(images, [category.id for category in truth.categories], annotations), make_results(records)


def same(one: dict, other: dict, tolerance: float = 1e-12) -> None:
    assert list(one) == list(other) == list(METRICS)
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=0, atol=tolerance)  # NaN equals NaN


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([1, 3, 100]))
def test_multiplicities_of_one_reproduce_pycocotools(seed, max_dets):
    truth, results = scene(seed, ties=True)
    weights = np.ones((2, len(truth.images)), np.int64)
    weighted = weighted_metrics(curves(match(results, truth, max_dets)), weights)
    for row in range(2):
        same(
            {name: values[row] for name, values in weighted.items()},
            dict(evaluate(results, truth, max_dets=max_dets).metrics),
        )


@settings(deadline=None, max_examples=30)
@given(seeds, st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_multiplicities_say_the_same_as_images_that_really_repeat(seed, weights):
    truth, results = scene(seed, ties=False)
    weights = np.array(weights)
    weighted = weighted_metrics(curves(match(results, truth, 100)), weights[None])
    truth, results = repeated(truth, results, weights)
    same({name: values[0] for name, values in weighted.items()}, dict(evaluate(results, truth).metrics))


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(0, 9), st.integers(1, 12))
def test_some_draws_at_a_time_give_the_same_bits(seed, resamples, at_once):
    truth, results = scene(seed, ties=True)
    rows = curves(match(results, truth, 100))
    images = len(truth.images)
    whole = weighted_metrics(rows, resample(images, resamples, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resampling, "_CHUNK", at_once * max(images, sum(len(row) * 10 for row in rows)))
        parts = resampled_metrics(rows, images, resamples, seed)
    assert {name: values.tobytes() for name, values in parts.items()} == {
        name: values.tobytes() for name, values in whole.items()
    }


def test_many_draws_of_many_images_need_little_memory():
    truth = make_truth(list(range(4000)), [1], [(1, 1, [0, 0, 20, 20], False)])
    results = make_results([(1, 1, [0, 0, 20, 20], 0.5)])
    rows = curves(match(results, truth, 100))
    tracemalloc.start()
    resampled_metrics(rows, 4000, 5000, 0)  # 160 MB, if drawn all at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


@pytest.mark.parametrize("objects", [29, 50, 58, 100])
def test_recall_levels_are_reached_as_in_pycocotools(objects):
    # Recall k / n meets the 101 levels exactly for such n, where rounding decides: .29 is not 29 * .01 in floats.
    truth = make_truth([1, 2], [1], [(1, 1, [30 * i, 0, 20, 20], False) for i in range(objects)])
    rng = np.random.default_rng(objects)
    boxes = [[30 * i, 0 if rng.random() < 0.7 else 50, 20, 20] for i in range(objects)]
    results = make_results([(1, 1, box, rng.random()) for box in boxes])
    weighted = weighted_metrics(curves(match(results, truth, 100)), np.ones((1, 2), np.int64))
    same({name: values[0] for name, values in weighted.items()}, dict(evaluate(results, truth).metrics))


def test_the_interval_is_that_of_measuring_every_resample():
    truth, before = scene(11, ties=False)
    rng = np.random.default_rng(0)
    after = replace(before, score=rng.permutation(before.score), bbox=before.bbox + rng.normal(0, 1, before.bbox.shape))
    after = replace(after, bbox=np.maximum(after.bbox, 0))
    draws = resample(len(truth.images), 12, 4)
    slow = []
    for weights in draws:
        sides = [evaluate(*reversed(repeated(truth, results, weights))).metrics for results in (before, after)]
        slow.append([sides[1][name] - sides[0][name] for name in METRICS])
    fast = compare(before, after, truth, resamples=12, seed=4)
    for name, values in zip(METRICS, np.array(slow).T, strict=True):
        expected = np.quantile(values[~np.isnan(values)], [0.025, 0.975])
        np.testing.assert_allclose(fast.intervals[name], expected, rtol=0, atol=1e-12, err_msg=name)
    assert fast.differences["AP"] == fast.after.metrics["AP"] - fast.before.metrics["AP"]
    assert fast.intervals["AP"][0] < fast.intervals["AP"][1]


def test_a_resample_draws_as_many_images_as_there_are():
    draws = resample(50, 400, 0)
    assert draws.shape == (400, 50)
    assert (draws.sum(1) == 50).all()
    assert abs(draws.mean(0) - 1).max() < 0.3
    assert draws.var() == pytest.approx(1 - 1 / 50, abs=0.05)  # binomial (50, 1/50)


def test_the_seed_decides_and_the_chunks_do_not(monkeypatch):
    truth, before = scene(2, ties=True)
    after = replace(before, score=before.score[::-1].copy())
    first = compare(before, after, truth, resamples=40, seed=1)
    monkeypatch.setattr(resampling, "_CHUNK", 7)
    assert compare(before, after, truth, resamples=40, seed=1).intervals == first.intervals
    assert compare(before, after, truth, resamples=40, seed=2).intervals != first.intervals


def test_equal_sets_differ_by_exactly_nothing_on_every_draw():
    truth, results = scene(2, ties=True)
    table = compare(results, results, truth, resamples=50)
    assert {value for pair in table.intervals.values() for value in pair} == {0.0}
    assert table.rows()[0][3:] == ("+0.0", "[+0.0, +0.0]")


# Tables ---------------------------------------------------------------------------------------------------------------


def test_rows_are_points_with_one_decimal():
    truth, after = scene(2, ties=False)
    before = replace(after, bbox=after.bbox * [1, 1, 1.2, 1.0])
    table = compare(before, after, truth, resamples=20)
    names, *_ = zip(*table.rows(), strict=True)
    assert names == METRICS
    low, high = table.intervals["AP50"]
    sides = [100 * table.before.metrics["AP50"], 100 * table.after.metrics["AP50"]]
    assert table.rows()[1] == (
        "AP50",
        f"{sides[0]:.1f}",
        f"{sides[1]:.1f}",
        f"{sides[1] - sides[0]:+.1f}",
        f"[{100 * low:+.1f}, {100 * high:+.1f}]",
    )
    assert table.after.rows()[1] == ("AP50", f"{sides[1]:.1f}")


def test_a_small_loss_is_not_written_as_minus_zero():
    truth, results = scene(2, ties=False)
    table = compare(results, results, truth, resamples=0)
    lower = replace(table.before, metrics={name: value - 1e-5 for name, value in table.before.metrics.items()})
    assert {row[3:] for row in replace(table, after=lower).rows()} == {("+0.0", "-")}


def test_the_dict_survives_json():
    truth, results = scene(2, ties=False)
    table = compare(results, results, truth, resamples=10, seed=3)
    plain = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert plain["after"]["metrics"] == dict(table.after.metrics)
    assert plain["differences"]["AP"] == 0
    assert (plain["resamples"], plain["seed"]) == (10, 3)
    assert [category["id"] for category in plain["before"]["categories"]] == [0, 1, 2, 3]
    assert plain["before"]["categories"][3] == {"id": 3, "name": "thing 3", "ap": None}  # it has no object
