"""Detections and files that the tests of COCO json share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from iou_refiner.coco import Results

SETTINGS = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = {"image_id": 139, "category_id": 18, "bbox": [1.5, 2, 30.25, 40], "score": 0.5}
finite = st.floats(-1e6, 1e6, allow_nan=False)


TRUTH: dict[str, list[dict[str, Any]]] = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "width": 64, "height": 48, "license": 1},
        {"id": 4, "file_name": "a.jpg", "width": 32, "height": 32},
    ],
    "annotations": [
        {"id": 0, "image_id": 9, "category_id": 2, "bbox": [1, 2, 3, 4.5], "segmentation": [[1, 2]]},
        {"id": 0, "image_id": 9, "category_id": 7, "bbox": [0, 0, 5, 5], "area": 20, "iscrowd": 1},
    ],
    "categories": [{"id": 2, "name": "cat"}, {"id": 7, "name": "dog", "supercategory": "animal"}],
}


@st.composite
def some_results(draw: st.DrawFn, with_iou: bool | None = None) -> Results:
    n = draw(st.integers(0, 12))
    score = hnp.arrays(np.float64, n, elements=st.floats(0, 1) | st.sampled_from([0.5, 0.25]))
    if with_iou is None:
        with_iou = draw(st.booleans())
    return Results(
        draw(hnp.arrays(np.int64, n, elements=st.integers(-2, 5))),
        draw(hnp.arrays(np.int64, n, elements=st.integers(1, 90))),
        draw(hnp.arrays(np.float64, (n, 4), elements=finite)),
        draw(score),
        draw(score) if with_iou else None,
        draw(st.none() | st.lists(st.just({}) | st.just({"note": [1]}), min_size=n, max_size=n).map(tuple)),
    )


def assert_same(a: Results, b: Results) -> None:
    for name in ("image_id", "category_id", "bbox", "score"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.iou is None) == (b.iou is None)
    if a.iou is not None and b.iou is not None:
        np.testing.assert_array_equal(a.iou, b.iou)
    assert (a.extra or ({},) * len(a)) == (b.extra or ({},) * len(b))


def put(tmp_path: Path, content: Any, name: str = "dets.json") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path
