"""The numbers are those of pycocotools, and what would make them wrong is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.evaluation.ap import METRICS, evaluate, fast_evaluator, match, summary
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.evaluation.true_iou import true_iou
from tests.kit.needs import DEV, needs_package
from tests.kit.scenes import make_results, make_truth, scene, seeds


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


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(1, 5))
def test_the_fast_evaluator_agrees_with_pycocotools(seed, max_dets):
    """Also with equal scores, ignored regions, categories without objects, and more detections than count."""
    needs_package("faster_coco_eval", install=DEV)
    fast = fast_evaluator()
    assert fast is not None
    truth, results = scene(seed, ties=True)
    ours, reference = (summary(by(results, truth, max_dets), len(results)) for by in (fast, match))
    for name in METRICS:
        np.testing.assert_allclose(ours.metrics[name], reference.metrics[name], rtol=0, atol=1e-9)
    for mine, theirs in zip(ours.categories, reference.categories, strict=True):
        assert (mine.id, mine.name) == (theirs.id, theirs.name)
        np.testing.assert_allclose(mine.ap, theirs.ap, rtol=0, atol=1e-9)
    assert replace(ours, metrics={}, categories=()) == replace(reference, metrics={}, categories=())


def test_without_the_fast_evaluator_it_is_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert fast_evaluator() is None
    truth, results = scene(5, ties=False)
    assert str(evaluate(results, truth)) == str(summary(match(results, truth, 100), len(results)))


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
    by_id = {category.id: (category.name, category.ap) for category in evaluation.categories}
    assert list(by_id) == [3, 5, 7]
    assert by_id[3] == ("thing 3", 0.0)
    assert by_id[7] == ("thing 7", pytest.approx(1.0))
    assert math.isnan(by_id[5][1])
    assert evaluation.metrics["AP"] == pytest.approx(0.5)
    assert (evaluation.images, evaluation.records, evaluation.max_dets) == (2, 2, 100)


def test_max_dets_counts_per_image_and_category():
    boxes = [[30 * (i % 20), 40 * (i // 20), 20, 30] for i in range(40)]
    for categories, expected in ((1, 20 / 40), (2, 1.0)):
        annotations = [(1, i % categories, box, False) for i, box in enumerate(boxes)]
        results = make_results([(1, i % categories, box, 0.9) for i, box in enumerate(boxes)])
        evaluation = evaluate(results, make_truth([1], range(categories), annotations), max_dets=20)
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


def test_evaluation_needs_no_torch():
    code = "import sys, iou_refiner.evaluation.ap, iou_refiner.evaluation.bootstrap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
