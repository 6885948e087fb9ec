"""A sound results file as rows, its ground truth, and changes to make in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.validation.findings import Finding, Report, format_report
from iou_refiner.validation.validate import validate

Rows = list[dict[str, Any]]
Truth = dict[str, list[dict[str, Any]]]

CATEGORIES = (1, 2, 3, 5, 7, 90)
SIZES = {11: (640, 480), 25: (500, 375), 139: (333, 500), 400: (640, 427)}


def good_truth() -> Truth:
    return {
        "images": [
            {"id": image, "file_name": f"{image + 1000:012}.jpg", "width": width, "height": height}
            for image, (width, height) in reversed(SIZES.items())  # ids need not ascend
        ],
        "annotations": [
            {"id": 1 + index, "image_id": image, "category_id": 5, "bbox": [1, 2, 30, 40], "area": 900, "iscrowd": 0}
            for index, image in enumerate(SIZES)
        ],
        "categories": [{"id": category, "name": f"c{category}"} for category in CATEGORIES],
    }


def good_rows(count: int = 60) -> Rows:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        image = list(SIZES)[index % len(SIZES)]
        low, high = np.sort(rng.uniform(0, 1, (2, 2)), axis=0) * SIZES[image]
        rows.append(
            {
                "image_id": image,
                "category_id": CATEGORIES[index % 6],
                "bbox": [round(float(value), 2) for value in (*low, *(high - low))],
                "score": round(float(rng.uniform(0.001, 1)), 5),
            }
        )
    rows[0]["score"] = 0.00123
    return rows


def run(tmp_path: Path, rows: Any, truth: Any = None, **options: Any) -> Report:
    def put(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return validate(put("dets.json", rows), None if truth is None else put("truth.json", truth), **options)


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, format_report(report)
    return report.findings[0]


def codes_of(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]
