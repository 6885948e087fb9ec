from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_refiner import bootstrap
from iou_refiner._checks import DataError
from iou_refiner.bootstrap import compare, curves, resample, weighted_metrics
from iou_refiner.coco import Category, GroundTruth, Image, Results
from iou_refiner.evaluation import METRICS, calibration, evaluate, match, ranking, true_iou

seeds = st.integers(0, 2**32 - 1)


def make_truth(images: Sequence[int], categories: Sequence[int], objects: Sequence[tuple] = ()) -> GroundTruth:
    """``objects``: rows (image, category, box, is crowd)."""
    boxes = np.array([row[2] for row in objects], float).reshape(-1, 4)
    return GroundTruth(
        tuple(Image(image, f"{image}.jpg", 640, 480) for image in images),
        tuple(Category(category, f"thing {category}") for category in categories),
        np.arange(1, len(objects) + 1),
        np.array([row[0] for row in objects], np.int64),
        np.array([row[1] for row in objects], np.int64),
        boxes,
        boxes[:, 2] * boxes[:, 3],
        np.array([row[3] for row in objects], bool),
    )


def make_results(records: Sequence[tuple] = ()) -> Results:
    """``records``: rows (image, category, box, score)."""
    return Results(
        np.array([row[0] for row in records], np.int64),
        np.array([row[1] for row in records], np.int64),
        np.array([row[2] for row in records], float).reshape(-1, 4),
        np.array([row[3] for row in records], float),
    )


def scene(seed: int, *, ties: bool, images: int = 7) -> tuple[GroundTruth, Results]:
    """Objects of all sizes, crowds, a category without objects, images without anything, hits, near misses, noise."""
    rng = np.random.default_rng(seed)
    identifiers = np.sort(rng.permutation(100)[:images]).tolist()
    objects, records = [], []
    for image in identifiers:
        for _ in range(rng.integers(5)):
            size = np.exp(rng.uniform(2, 5.5, 2))
            category, crowd = int(rng.integers(3)), bool(rng.random() < 0.15)
            box = np.concatenate([rng.uniform(0, 300, 2), size])
            objects.append((image, category, box, crowd))
            for _ in range(rng.integers(4)):
                shift = rng.normal(0, 0.1, 4)
                near = np.concatenate([box[:2] + shift[:2] * size, size * np.exp(shift[2:])])
                records.append((image, category, near, rng.random()))
        for _ in range(rng.integers(4)):
            noise = np.concatenate([rng.uniform(0, 300, 2), np.exp(rng.uniform(2, 5.5, 2))])
            records.append((image, int(rng.integers(4)), noise, rng.random()))
    results = make_results(records)
    if ties:
        results = replace(results, score=np.round(results.score, 1))
    return make_truth(identifiers, [3, 1, 0, 2], objects), results


def repeated(truth: GroundTruth, results: Results, weights: np.ndarray) -> tuple[GroundTruth, Results]:
    """The data set in which image ``i`` really stands ``weights[i]`` times, under new ids."""
    images, objects, records = [], [], []
    for image, weight in zip(truth.images, weights, strict=True):
        for _ in range(weight):
            images.append(len(images))
            for i in np.flatnonzero(truth.image_id == image.id):
                objects.append((images[-1], truth.category_id[i], truth.bbox[i], truth.iscrowd[i]))
            for i in np.flatnonzero(results.image_id == image.id):
                records.append((images[-1], results.category_id[i], results.bbox[i], results.score[i]))
    return make_truth(images, [category.id for category in truth.categories], objects), make_results(records)


def raw_pycocotools(truth: GroundTruth, results: Results) -> COCOeval:
    """pycocotools as its own demo calls it, without our checks."""
    coco = COCO()
    coco.dataset = {"info": {}, **truth.to_coco_dict()}
    columns = (results.image_id, results.category_id, results.bbox, results.score)
    keys = ("image_id", "category_id", "bbox", "score")
    records = [dict(zip(keys, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(records), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def same(one: dict, other: dict, tolerance: float = 1e-12) -> None:
    assert list(one) == list(other) == list(METRICS)
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=0, atol=tolerance)  # NaN equals NaN


# The numbers ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_the_numbers_are_those_pycocotools_summarises(seed):
    truth, results = scene(seed, ties=True)
    if not len(results):
        return
    stats = [value if value >= 0 else math.nan for value in raw_pycocotools(truth, results).stats]
    ours = evaluate(results, truth).metrics
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    np.testing.assert_allclose([ours[name] for name in names], stats[:6], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours["AR"], stats[8], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "threshold"), [("AP60", 0.6), ("AP70", 0.7), ("AP80", 0.8), ("AP90", 0.9)])
def test_each_threshold_is_the_one_it_says(name, threshold):
    # One object, one box that covers just over, or just under, the threshold's part of it.
    truth = make_truth([1], [1], [(1, 1, [0, 0, 100, 100], False)])
    for part, expected in ((threshold + 0.01, 1.0), (threshold - 0.01, 0.0)):
        results = make_results([(1, 1, [0, 0, 100, 100 * part], 0.5)])
        assert evaluate(results, truth).metrics[name] == pytest.approx(expected)


def test_each_category_has_its_own_ap():
    box = [10, 10, 50, 50]
    truth = make_truth([1, 2], [7, 3, 5], [(1, 7, box, False), (2, 3, box, False)])
    evaluation = evaluate(make_results([(1, 7, box, 0.9), (1, 3, box, 0.8)]), truth)
    found = {category.id: (category.name, category.ap) for category in evaluation.categories}
    assert list(found) == [3, 5, 7]
    assert found[3] == ("thing 3", 0.0)
    assert found[7] == ("thing 7", pytest.approx(1.0))
    assert math.isnan(found[5][1])
    assert evaluation.metrics["AP"] == pytest.approx(0.5)
    assert (evaluation.images, evaluation.records, evaluation.max_dets) == (2, 2, 100)


def test_max_dets_counts_per_image_and_category():
    boxes = [[30 * (i % 20), 40 * (i // 20), 20, 30] for i in range(40)]
    for categories, expected in ((1, 20 / 40), (2, 1.0)):
        objects = [(1, i % categories, box, False) for i, box in enumerate(boxes)]
        found = make_results([(1, i % categories, box, 0.9) for i, box in enumerate(boxes)])
        evaluation = evaluate(found, make_truth([1], range(categories), objects), max_dets=20)
        assert evaluation.metrics["AR"] == pytest.approx(expected)
        assert evaluation.metrics["AP"] == pytest.approx(expected, abs=0.01)


def test_nothing_is_printed_and_nothing_is_changed(capsys):
    truth, results = scene(5, ties=True)
    arrays = [*vars(truth).values(), *vars(results).values()]
    for array in arrays:
        if isinstance(array, np.ndarray):
            array.setflags(write=False)
    before = truth.to_coco_dict()
    compare(results, results, truth, resamples=3)
    assert truth.to_coco_dict() == before
    assert capsys.readouterr() == ("", "")


# Empty and degenerate -------------------------------------------------------------------------------------------------


def test_no_detections_score_zero():
    truth, _ = scene(1, ties=False)
    assert set(evaluate(make_results(), truth).metrics.values()) == {0.0}
    table = compare(make_results(), make_results(), truth, resamples=5)
    assert table.intervals["AP"] == (0.0, 0.0)


@pytest.mark.parametrize(
    "truth",
    [make_truth([], []), make_truth([], [1]), make_truth([1], []), make_truth([1], [1])],
    ids=["nothing", "no images", "no categories", "no objects"],
)
def test_without_objects_there_is_nothing_to_measure(truth):
    evaluation = evaluate(make_results(), truth)
    assert all(math.isnan(value) for value in evaluation.metrics.values())
    assert evaluation.rows() == [(name, "-") for name in METRICS]
    table = compare(make_results(), make_results(), truth, resamples=4)
    assert table.rows() == [(name, "-", "-", "-", "-") for name in METRICS]
    plain = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert plain["before"]["metrics"]["AP"] is None
    assert plain["intervals"]["AP"] == [None, None]
    assert true_iou(make_results(), truth).shape == (0,)


# What is refused ------------------------------------------------------------------------------------------------------


def test_pycocotools_takes_boxes_of_nan_for_hits_and_we_refuse_them():
    truth, results = scene(3, ties=False, images=20)
    diverged = results.bbox.copy()
    diverged[::3] = np.nan
    broken = replace(results, bbox=diverged)
    # The trap itself: boxes without a place raise AP, above all where it is hard to get.
    sound, trapped = raw_pycocotools(truth, results).stats, raw_pycocotools(truth, broken).stats
    assert trapped[0] > sound[0] + 0.01
    assert trapped[2] > sound[2] + 0.01
    with pytest.raises(DataError, match=r"`results`: record 1 \(image \d+\), and \d+ more: `bbox` is \[nan, nan, "):
        evaluate(broken, truth)
    with pytest.raises(DataError, match=r"`after`: record 1 .* must be four finite numbers. Repair or drop"):
        compare(results, broken, truth)


def with_value(column: str, value: object) -> Results:
    records = make_results([(4, 1, [1, 2, 3, 4], 0.5)] * 3)
    values = getattr(records, column).copy()
    values[1] = value
    return replace(records, **{column: values})


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("bbox", [0, 0, np.inf, 1], r"`bbox` is \[0.0, 0.0, inf, 1.0\], but must be four finite numbers"),
        ("bbox", [0, np.nan, 1, 1], r"`bbox` is \[0.0, nan, 1.0, 1.0\], but must be four finite numbers"),
        ("bbox", [0, 0, 1, -2], r"`bbox` is \[0.0, 0.0, 1.0, -2.0\], but must be \[x, y, width, height\]"),
        ("bbox", [0, 0, 2e5, 1e5], r"but must not cover more than 1e\+10 square pixels"),
        ("bbox", [0, 0, 1e300, 1e300], r"but must not cover more than 1e\+10 square pixels"),
        ("score", np.nan, "`score` is nan, but must be a finite number"),
        ("score", -np.inf, "`score` is -inf, but must be a finite number"),
        ("image_id", 9, r"record 2 \(image 9\).* `image_id` is 9, but must occur in the ground truth. Is it the one"),
        ("category_id", 0, "`category_id` is 0, but must occur in the ground truth"),
    ],
)
def test_records_that_would_give_a_wrong_number_are_refused(column, value, message):
    truth, results = make_truth([4], [1], [(4, 1, [1, 2, 3, 4], False)]), with_value(column, value)
    for refuse in (lambda: evaluate(results, truth), lambda: true_iou(results, truth)):
        with pytest.raises(DataError, match=message) as error:
            refuse()
        assert str(error.value).startswith("`results`: record 2 (image ")


@pytest.mark.parametrize(("box", "message"), [([0, 0, np.nan, 1], "finite"), ([0, 0, -1, 1], "no size below 0")])
def test_boxes_of_the_ground_truth_are_held_to_the_same(box, message):
    truth = make_truth([4], [1], [(4, 1, [0, 0, 1, 1], False), (4, 1, box, False)])
    with pytest.raises(DataError, match=rf"`ground_truth`: record 2 \(image 4\), and 0 more: `bbox` .*{message}"):
        evaluate(make_results(), truth)


def test_arguments_out_of_range_are_refused():
    truth = make_truth([1], [1])
    with pytest.raises(ValueError, match="`max_dets` must be a finite number above 0, got 0"):
        evaluate(make_results(), truth, max_dets=0)
    with pytest.raises(ValueError, match="`max_dets`"):
        compare(make_results(), make_results(), truth, max_dets=-1)
    with pytest.raises(ValueError, match="`resamples` must not be negative, got -1"):
        compare(make_results(), make_results(), truth, resamples=-1)


# The interval ---------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(bootstrap, "_CHUNK", 7)
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


# Predicted IoU --------------------------------------------------------------------------------------------------------


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


def test_evaluation_needs_no_torch():
    code = "import sys, iou_refiner.evaluation, iou_refiner.bootstrap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
