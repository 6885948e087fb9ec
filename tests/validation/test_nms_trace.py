"""Traces of NMS, against slow oracles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner.coco import Results, xywh_to_xyxy
from iou_refiner.validation import nms_trace
from iou_refiner.validation.nms_trace import suppressed_at
from tests.kit.detection_rows import Rows, codes_of, run


def slow_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if width * height else 0.0


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 9999), count=st.integers(0, 40))
def test_overlaps_are_those_of_the_slow_loop(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    image, category = rng.integers(0, 3, (2, count))
    boxes = rng.uniform(0, 50, (count, 4))
    overlaps = nms_trace._same_class_overlaps(Results(image, category, boxes, rng.uniform(0, 1, count)))
    corners = xywh_to_xyxy(boxes).tolist()
    expected = [
        slow_iou(corners[a], corners[b])
        for a in range(count)
        for b in range(a)
        if image[a] == image[b] and category[a] == category[b]
    ]
    np.testing.assert_allclose(np.sort(overlaps), sorted(value for value in expected if value > 0))


def greedy_nms(rows: Rows, threshold: float) -> Rows:
    detections: Rows = []
    for row in sorted(rows, key=lambda row: -row["score"]):
        corners = xywh_to_xyxy(np.array([row["bbox"]]))[0].tolist()
        rivals = [
            other
            for other in detections
            if other["image_id"] == row["image_id"] and other["category_id"] == row["category_id"]
        ]
        overlaps = [slow_iou(corners, xywh_to_xyxy(np.array([other["bbox"]]))[0].tolist()) for other in rivals]
        if all(overlap <= threshold for overlap in overlaps):
            detections.append(row)
    return detections


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_nms_is_recognised_and_its_absence_too(tmp_path: Path, threshold: float) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for image in range(15):
        objects = rng.uniform(0, 200, (4, 4)) + np.array([0, 0, 40, 40])
        for box in objects[rng.integers(0, 4, 60)] + rng.normal(0, 12, (60, 4)):
            score = float(rng.uniform(0.001, 1))
            rows.append({"image_id": image, "category_id": 1, "bbox": box.clip(1).tolist(), "score": score})
    assert "W220" not in codes_of(run(tmp_path, rows))
    report = run(tmp_path, greedy_nms(rows, threshold))
    messages = [finding.message for finding in report.findings if finding.code == "W220"]
    assert len(messages) == 1
    assert abs(float(messages[0].split("about ")[1][:4]) - threshold) <= 0.01


def test_the_sample_of_pairs_is_bounded_and_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    count = 6000
    image = np.repeat(np.arange(count // 50), 50)
    results = Results(image, np.ones(count, np.int64), rng.uniform(0, 9, (count, 4)), rng.uniform(0, 1, count))
    monkeypatch.setattr(nms_trace, "_PAIRS", 10_000)
    monkeypatch.setattr(nms_trace, "_PER_GROUP", 40)
    rows, group = nms_trace._sample_groups(results)
    sizes = np.bincount(group)
    assert set(sizes[sizes > 0].tolist()) == {40}
    assert 0 < (sizes * (sizes - 1) // 2).sum() <= 10_000
    for number in np.unique(group).tolist():
        best = np.sort(results.score[image == image[rows[group == number][0]]])[::-1][:40]
        np.testing.assert_array_equal(results.score[rows[group == number]], best)


def pairs(overlaps: list[float]) -> Results:
    """One pair of boxes of each overlap, each pair in an image of its own."""
    shift = [100 * (1 - overlap) / (1 + overlap) for overlap in overlaps]
    boxes = [[x, 0.0, 100.0, 40.0] for distance in shift for x in (0.0, distance)]
    image = np.repeat(np.arange(len(overlaps)), 2)
    return Results(image, np.ones(len(image), np.int64), np.array(boxes).reshape(-1, 4), np.full(len(image), 0.5))


@pytest.mark.parametrize(
    ("overlaps", "expected"),
    [
        (np.linspace(0.41, 0.5, 20), 0.5),
        (np.linspace(0.61, 0.7, 20), 0.7),
        (np.linspace(0.41, 0.5, 19), None),  # too few to tell
        (np.linspace(0.87, 0.96, 30), None),  # what NMS leaves no trace of
        (np.linspace(0.1, 0.19, 30), None),  # what lies apart anyway
        (np.array([]), None),
    ],
)
def test_the_threshold_is_the_largest_overlap_if_others_crowd_below(
    overlaps: np.ndarray, expected: float | None
) -> None:
    threshold = suppressed_at(pairs(overlaps.tolist()))
    assert threshold == (None if expected is None else pytest.approx(expected))
