"""The report, as people and as programs read it."""

from __future__ import annotations

import json
from pathlib import Path

from iou_refiner.validation.findings import format_report
from tests.kit.detection_rows import good_rows, good_truth, run


def test_report_as_text(tmp_path: Path) -> None:
    rows = good_rows()
    rows[17]["score"] = "0.91"
    for row in rows[30:33]:
        row["score"] = -1
    assert format_report(run(tmp_path, rows, good_truth(), max_examples=2)).splitlines() == [
        "59 records, 4 images, 6 categories: 2 kinds of error, 0 of warning",
        "E202 error x1: wrong types. Write ids as integers and scores as numbers, without quotes.",
        '    record 18, image 25: score is a string ("0.91"), expected a number.',
        "E303 error x3: score outside [0, 1]. They look like logits: apply the sigmoid or softmax.",
        "    record 31, image 139: score -1",
        "    record 32, image 400: score -1",
        "    ... and 1 more",
    ]


def test_report_as_json(tmp_path: Path) -> None:
    rows = good_rows()
    rows[17]["score"] = -1
    report = json.loads(json.dumps(run(tmp_path, rows).to_dict()))
    assert report["ok"] is False
    assert report["records"] == 60
    assert report["findings"][0]["code"] == "E303"
    assert report["findings"][0]["examples"] == [{"record": 18, "image_id": 25, "text": "score -1"}]
