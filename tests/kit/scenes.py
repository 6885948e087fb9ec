"""Detections and annotations that the tests of evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from iou_refiner.coco import Category, GroundTruth, Image, Results

seeds = st.integers(0, 2**32 - 1)


def make_truth(images: Sequence[int], categories: Sequence[int], annotations: Sequence[tuple] = ()) -> GroundTruth:
    """``annotations``: rows (image, category, box, is crowd)."""
    boxes = np.array([row[2] for row in annotations], float).reshape(-1, 4)
    return GroundTruth(
        tuple(Image(image, f"{image}.jpg", 640, 480) for image in images),
        tuple(Category(category, f"thing {category}") for category in categories),
        np.arange(1, len(annotations) + 1),
        np.array([row[0] for row in annotations], np.int64),
        np.array([row[1] for row in annotations], np.int64),
        boxes,
        boxes[:, 2] * boxes[:, 3],
        np.array([row[3] for row in annotations], bool),
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
    """Objects of all sizes, ignored regions, a category without objects, empty images, hits, near misses, noise."""
    rng = np.random.default_rng(seed)
    identifiers = np.sort(rng.permutation(100)[:images]).tolist()
    annotations, records = [], []
    for image in identifiers:
        for _ in range(rng.integers(5)):
            size = np.exp(rng.uniform(2, 5.5, 2))
            category, crowd = int(rng.integers(3)), bool(rng.random() < 0.15)
            box = np.concatenate([rng.uniform(0, 300, 2), size])
            annotations.append((image, category, box, crowd))
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
    return make_truth(identifiers, [3, 1, 0, 2], annotations), results
