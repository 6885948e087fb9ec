"""The decomposition of TIDE against a slow oracle written from the paper, and the laws it obeys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.coco import GroundTruth, Results, xywh_to_xyxy
from iou_refiner.evaluation.ap import evaluate, match
from iou_refiner.reporting.errors import KINDS, Errors, find_errors
from iou_refiner.reporting.matching import Matching, image_ap, mean_ap
from tests.kit.reference import box_iou
from tests.kit.scenes import make_results, make_truth, scene, seeds

CASES = settings(deadline=None, max_examples=40)


def matched(results: Results, truth: GroundTruth, max_dets: int = 100) -> Matching:
    return Matching.of(match(results, truth, max_dets))


def errors_of(results: Results, truth: GroundTruth) -> Errors:
    return find_errors(matched(results, truth), results, truth)


def counts(errors: Errors) -> dict[str, int]:
    return {kind.name: kind.count for kind in errors.kinds if kind.count}


def mixed_up(seed: int) -> tuple[GroundTruth, Results]:
    """A scene without ignored regions in which a third of the detections have a class drawn at random."""
    truth, results = scene(seed, ties=False)
    truth = make_truth(
        [image.id for image in truth.images],
        [category.id for category in truth.categories],
        list(zip(truth.image_id, truth.category_id, truth.bbox, np.zeros(len(truth), bool), strict=True)),
    )
    rng = np.random.default_rng(seed)
    category = np.where(rng.random(len(results)) < 0.33, rng.integers(0, 3, len(results)), results.category_id)
    return truth, Results(results.image_id, category, results.bbox, results.score)


# --- the oracle: one image, one detection, one object at a time ------------------------------------------------------

Detection = dict


class Oracle:
    """TIDE as the paper tells it, on dicts and loops. Ignored regions are not its matter."""

    def __init__(self, truth: GroundTruth, results: Results):
        self.categories = sorted(category.id for category in truth.categories)
        self.objects = [
            {"image": image, "class": category, "box": tuple(box), "taken": False}
            for image, category, box in zip(truth.image_id, truth.category_id, xywh_to_xyxy(truth.bbox), strict=True)
        ]
        self.detections: list[Detection] = [
            {"image": image, "class": category, "box": tuple(box), "score": score, "object": None, "kind": None}
            for image, category, box, score in zip(
                results.image_id, results.category_id, xywh_to_xyxy(results.bbox), results.score, strict=True
            )
        ]
        self.detections.sort(key=lambda detection: -detection["score"])
        for detection in self.detections:
            self._match(detection)
        for detection in self.detections:
            if detection["object"] is None:
                self._explain(detection)
        aimed = [d["aim"] for d in self.detections if d["kind"] in ("localisation", "classification")]
        self.missed = [o for o in self.objects if not o["taken"] and not any(o is other for other in aimed)]

    def _match(self, detection: Detection) -> None:
        free = [o for o in self.objects if o["image"] == detection["image"] and o["class"] == detection["class"]]
        free = [o for o in free if not o["taken"] and box_iou(o["box"], detection["box"]) >= 0.5]
        if free:
            best = max(free, key=lambda o: box_iou(o["box"], detection["box"]))
            best["taken"], detection["object"] = True, best

    def _explain(self, detection: Detection) -> None:
        here = [(box_iou(o["box"], detection["box"]), o) for o in self.objects if o["image"] == detection["image"]]
        own = max((e for e in here if e[1]["class"] == detection["class"]), key=lambda e: e[0], default=(0, None))
        other = max((e for e in here if e[1]["class"] != detection["class"]), key=lambda e: e[0], default=(0, None))
        if 0.1 <= own[0] < 0.5:
            detection["kind"], detection["aim"] = "localisation", own[1]
        elif other[0] >= 0.5:
            detection["kind"], detection["aim"] = "classification", other[1]
        elif own[0] >= 0.5:
            detection["kind"] = "duplicate"
        elif max(own[0], other[0]) <= 0.1:
            detection["kind"] = "background"
        else:
            detection["kind"] = "both"

    def count(self, kind: str) -> int:
        return len(self.missed) if kind == "missed" else sum(d["kind"] == kind for d in self.detections)

    def ap(self, detections: list[Detection], objects: list[dict]) -> float:
        values = []
        for category in self.categories:
            total = sum(o["class"] == category for o in objects)
            if not any(o["class"] == category for o in self.objects):
                continue
            hits = [d["object"] is not None for d in detections if d["class"] == category]
            precision = [sum(hits[: n + 1]) / (n + 1) for n in range(len(hits))]
            recall = [sum(hits[: n + 1]) / total if total else 0 for n in range(len(hits))]
            best = [
                max((p for p, r in zip(precision, recall, strict=True) if r >= level), default=0)
                for level in np.linspace(0, 1, 101)
            ]
            values.append(sum(best) / 101 if any(hits) else 0.0)
        return sum(values) / len(values)

    def cost(self, kind: str) -> float:
        now = self.ap(self.detections, self.objects)
        if kind == "missed":
            left = [o for o in self.objects if not any(o is missed for missed in self.missed)]
            return self.ap(self.detections, left) - now
        if kind not in ("localisation", "classification"):
            return self.ap([d for d in self.detections if d["kind"] != kind], self.objects) - now
        mended, served = [], []
        for detection in self.detections:  # best score first, which is the one that remains of several
            aim = detection["aim"] if detection["kind"] == kind else detection["object"]
            if aim is None:
                mended.append(detection)
            elif not any(aim is other for other in served):
                served.append(aim)
                mended.append({**detection, "object": aim, "class": aim["class"]})
        return self.ap(mended, self.objects) - now


@CASES
@given(seed=seeds)
def test_kinds_and_costs_are_those_of_the_oracle(seed: int):
    truth, results = mixed_up(seed)
    if not len(truth):
        return
    oracle, errors = Oracle(truth, results), errors_of(results, truth)
    assert {kind.name: kind.count for kind in errors.kinds} == {kind: oracle.count(kind) for kind in KINDS}
    np.testing.assert_allclose([kind.cost for kind in errors.kinds], [oracle.cost(kind) for kind in KINDS], atol=1e-9)


# --- laws ------------------------------------------------------------------------------------------------------------


@CASES
@given(seed=seeds, ties=st.booleans())
def test_each_false_alarm_is_of_one_kind_and_nothing_else_is(seed: int, ties: bool):
    truth, results = scene(seed, ties=ties)
    matching = matched(results, truth)
    errors = find_errors(matching, results, truth)
    false_alarm = ~matching.hit[0] & ~matching.ignored[0]
    np.testing.assert_array_equal(errors.kind >= 0, false_alarm)
    assert sum(kind.count for kind in errors.kinds if kind.name != "missed") == false_alarm.sum()


@CASES
@given(seed=seeds, ties=st.booleans())
def test_missed_objects_are_not_hit(seed: int, ties: bool):
    truth, results = scene(seed, ties=ties)
    matching = matched(results, truth)
    errors = find_errors(matching, results, truth)
    assert not errors.missed[matching.gt[0][matching.hit[0]]].any()
    assert not (errors.missed & truth.iscrowd).any()


@CASES
@given(seed=seeds)
def test_perfect_detections_have_no_errors(seed: int):
    truth, _ = scene(seed, ties=False)
    rows = np.flatnonzero(~truth.iscrowd)
    perfect = Results(truth.image_id[rows], truth.category_id[rows], truth.bbox[rows], np.full(len(rows), 0.5))
    errors = errors_of(perfect, truth)
    assert counts(errors) == {}
    assert all(kind.cost == 0 or kind.cost != kind.cost for kind in errors.kinds)


@CASES
@given(seed=seeds, ties=st.booleans())
def test_mending_what_is_removed_never_costs_ap(seed: int, ties: bool):
    truth, results = scene(seed, ties=ties)
    for kind in errors_of(results, truth).kinds:
        if kind.name not in ("localisation", "classification"):
            assert not kind.cost < -1e-12


@CASES
@given(seed=seeds, ties=st.booleans())
def test_mean_ap_is_that_of_pycocotools(seed: int, ties: bool):
    truth, results = scene(seed, ties=ties)
    matching = matched(results, truth)
    counted = ~matching.ignored[0]
    num_gt = np.bincount(matching.gt_category[matching.judged], minlength=4)
    ap = mean_ap(matching.score[counted], matching.category[counted], matching.hit[0][counted], num_gt)
    np.testing.assert_allclose(ap, evaluate(results, truth).metrics["AP50"], atol=1e-9)


@CASES
@given(seed=seeds)
def test_ap_of_an_image_is_that_of_a_data_set_of_this_image_and_one_class(seed: int):
    truth, results = scene(seed, ties=False)
    rows = np.flatnonzero(~truth.iscrowd)
    annotations = [(truth.image_id[row], 1, truth.bbox[row], False) for row in rows]
    images = [image.id for image in truth.images]
    one_class = make_truth(images, [1], annotations)
    same = Results(results.image_id, np.ones(len(results), np.int64), results.bbox, results.score)
    values = image_ap(matched(same, one_class), len(images))
    for value, image in zip(values, sorted(images), strict=True):
        alone = make_truth([image], [1], [row for row in annotations if row[0] == image])
        expected = evaluate(same[same.image_id == image], alone).metrics["AP"]
        np.testing.assert_allclose(value, expected, atol=1e-9)


# --- one of each kind, by hand ---------------------------------------------------------------------------------------

OBJECT = (1, 1, (100, 100, 100, 100), False)
HIT = (1, 1, (100, 100, 100, 100), 0.9)


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([HIT], {}),
        ([(1, 1, (100, 100, 100, 40), 0.9)], {"localisation": 1}),
        ([(1, 2, (100, 100, 100, 95), 0.9)], {"classification": 1}),
        ([HIT, (1, 1, (100, 100, 100, 95), 0.8)], {"duplicate": 1}),
        ([HIT, (1, 1, (300, 300, 50, 50), 0.8)], {"background": 1}),
        ([HIT, (1, 2, (100, 100, 100, 40), 0.8)], {"both": 1}),
        ([], {"missed": 1}),
        ([(1, 2, (100, 100, 100, 40), 0.8)], {"both": 1, "missed": 1}),
    ],
)
def test_one_of_each(detections: list[tuple], expected: dict[str, int]):
    assert counts(errors_of(make_results(detections), make_truth([1], [1, 2], [OBJECT]))) == expected


def test_a_mended_box_takes_the_place_of_a_worse_one_on_the_same_object():
    loose = (1, 1, (100, 100, 100, 40), 0.95)
    errors = errors_of(make_results([loose, HIT]), make_truth([1], [1], [OBJECT]))
    costs = {kind.name: kind.cost for kind in errors.kinds}
    assert costs["localisation"] == pytest.approx(0.5)  # AP50 is 1/2 with a false alarm above the hit, then 1


def test_detections_in_ignored_regions_are_no_errors():
    crowd = (1, 1, (300, 300, 200, 200), True)
    inside = (1, 1, (320, 320, 50, 50), 0.8)
    assert counts(errors_of(make_results([HIT, inside]), make_truth([1], [1], [OBJECT, crowd]))) == {}


@pytest.mark.parametrize("annotations", [(), (OBJECT,)])
@pytest.mark.parametrize("records", [(), (HIT,)])
def test_nothing_at_all_is_ordinary(annotations: tuple, records: tuple):
    errors = errors_of(make_results(records), make_truth([1], [1], annotations))
    assert [kind.name for kind in errors.kinds] == list(KINDS)


def test_the_oracle_would_notice_another_order_of_the_kinds():
    # Loose on its own object, and fits one of another class: localisation comes first.
    truth = make_truth([1], [1, 2], [OBJECT, (1, 2, (100, 100, 100, 45), False)])
    results = make_results([(1, 1, (100, 100, 100, 45), 0.9)])
    assert Oracle(truth, results).count("localisation") == 1
    assert counts(errors_of(results, truth))["localisation"] == 1
