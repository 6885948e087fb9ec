"""A right annotation and right results of it, as plain JSON values; and the commands that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from iou_refiner import cli

Rows = list[dict[str, Any]]
Truth = dict[str, Any]
Call = Callable[..., tuple[int, str, str]]
SETTINGS = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZES = {3: (640, 480), 7: (500, 375), 8: (333, 500), 20: (640, 427), 21: (480, 640), 40: (320, 240)}
SIZES |= {image + 100: (width, height + 8) for image, (width, height) in SIZES.items()}
CATEGORIES = {1: "cat", 2: "dog", 5: "boat"}


def right_truth() -> Truth:
    """Twelve images with one object of each of three categories, and three more of the first: 72 objects."""
    rng = np.random.default_rng(3)
    annotations = []
    for image, size in SIZES.items():
        for category in (1, 2, 5, 1, 1, 1):
            side = rng.uniform(0.1, 0.3, 2) * size
            corner = rng.uniform(0, 1, 2) * (size - side)
            box = np.round([*corner, *side], 2).tolist()
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box}
            annotations.append({**row, "area": round(box[2] * box[3], 2), "iscrowd": 0})
    images = [{"id": i, "file_name": f"{i:03}.jpg", "width": w, "height": h} for i, (w, h) in SIZES.items()]
    return {
        "info": {"year": 2024},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }


def right_rows() -> Rows:
    """Two boxes near every object: 144 records."""
    rng = np.random.default_rng(4)
    rows = []
    for annotation in right_truth()["annotations"]:
        width, height = SIZES[annotation["image_id"]]
        for spread in (0.3, 0.6):
            x, y, w, h = np.asarray(annotation["bbox"]) + rng.normal(0, spread, 4)
            x, y = max(x, 0), max(y, 0)
            box = np.round([x, y, min(w, width - x), min(h, height - y)], 2).tolist()
            score = round(float(rng.uniform(0.1, 0.2) / spread), 5)
            rows.append({k: annotation[k] for k in ("image_id", "category_id")} | {"bbox": box, "score": score})
    rows[5]["score"] = 0.00123
    return rows


def every(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], None]:
    """The same done to every record of results, or to every annotation."""

    def apply(content: Any) -> None:
        for row in content if isinstance(content, list) else content["annotations"]:
            row.update(change(row))

    return apply


def boxes(change: Callable[[np.ndarray], Any]) -> Callable[[Any], None]:
    """The same done to every box."""
    return every(lambda row: {"bbox": np.round(change(np.array(row["bbox"])), 3).tolist()})


def whole(change: Callable[[bytes], bytes]) -> Callable[[Any], bytes]:
    """Something done to the bytes of the file."""
    return lambda content: change(json.dumps(content).encode())


def changed(right: Any, change: Callable[[Any], Any]) -> Any:
    """A right file after a change, which changes it in place or gives another content."""
    content = change(right)
    return content if isinstance(content, (bytes, str)) else right


def put(path: Path, content: Any) -> Path:
    """Write bytes as they are, text as UTF-8, and all else as JSON."""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def caller(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process: exit code, stdout, stderr. Never a traceback."""

    def call(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        code = left.value.code
        assert isinstance(code, int)
        return code, out, err

    return call


def change_row(row: dict[str, Any], change: str, key: str, value: Any) -> None:
    """Change one record in place; changes of another name are of the whole file, and left to the caller."""
    if change == "drop":
        row.pop(key, None)
    elif change in ("set", "set all"):
        row[key] = value
    elif change == "rename" and key in row:
        row[key + "s"] = row.pop(key)
    elif change == "negate" and isinstance(row.get(key), (int, float)):
        row[key] = -row[key]
    elif change == "coordinate" and isinstance(row.get("bbox"), list) and row["bbox"]:
        row["bbox"] = [*row["bbox"][:-1], value]
