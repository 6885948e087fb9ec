"""What a head remembers of candidates, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from iou_refiner.checks import DataError
from iou_refiner.siblings.likeness import check_likeness, likeness

SCORES = np.random.default_rng(0).beta(0.5, 3, 5000)


def test_it_is_plain_data_about_scores_and_crowd():
    about = likeness(SCORES, 12.34567)
    assert about["crowd"] == 12.346
    np.testing.assert_allclose(about["score_quantiles"], np.sort(SCORES)[[500, 2500, 4500]], rtol=0.02)
    assert json.loads(json.dumps(about)) == about


def test_other_candidates_of_the_same_detector_are_taken():
    trained = likeness(SCORES[:2500], 12)
    check_likeness(trained, trained, "c.json")
    check_likeness(trained, likeness(SCORES[2500:], 9), "c.json")
    check_likeness(trained, likeness(np.clip(SCORES * 1.3, 0, 1), 30), "c.json")


def test_scores_of_another_range_are_refused():
    trained = likeness(SCORES, 12)
    for other in (SCORES[SCORES > 0.2], SCORES**3, SCORES / 10, 1 - SCORES):
        with pytest.raises(DataError, match=r"c\.json: .*scores of another detector, or cut .*--no-check"):
            check_likeness(trained, likeness(other, 12), "c.json")


@pytest.mark.parametrize("crowd", [0.0, 1.5, 4.0])
def test_what_a_suppression_left_is_refused(crowd):
    message = rf"c\.json: {crowd:.2f} candidates overlap a box .* in training it was 12\.00: .*iou-refiner dump"
    with pytest.raises(DataError, match=message):
        check_likeness(likeness(SCORES, 12), likeness(SCORES, crowd), "c.json")


def test_a_head_that_remembers_nothing_refuses_nothing():
    check_likeness({}, likeness(SCORES, 0), "c.json")


def test_scores_of_zero_and_one_are_compared():
    extreme = likeness(np.array([0.0, 0, 1, 1]), 5)
    check_likeness(extreme, extreme, "c.json")


def test_no_candidates_are_like_all():
    none = likeness(np.zeros(0), 0)
    check_likeness(likeness(SCORES, 12), none, "c.json")
