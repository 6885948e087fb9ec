"""A small data set on disk, with names that attack a page, and a report of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PIL

from iou_refiner.coco import Results, write_results

HOSTILE = "<script>document.title='run'</script>"
QUOTED = "\"'><img src=x onerror=document.title='run'>&amp;\u202e\x1b[2J"
SIDE = 200


class Case(NamedTuple):
    """Paths of the two results files, the annotation and the images."""

    before: Path
    after: Path
    ann: Path
    images: Path


def make_case(folder: Path, images: int = 16, *, seed: int = 0) -> Case:
    """Boxes that fit loosely before; after, they fit better in every image but each fourth, where they fit worse."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    entries, annotations = [], []
    sides: tuple[list, list] = ([], [])
    for image in range(1, images + 1):
        name = f"{image}-{HOSTILE.replace('/', '')}.png" if image % 2 else f"{image} {'long_name_' * 12}.png"
        PIL.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(folder / "images" / name)
        entries.append({"id": image, "file_name": name, "width": SIDE, "height": SIDE})
        for quarter in range(3):
            x, y = (quarter % 2) * 100 + rng.uniform(5, 20), (quarter // 2) * 100 + rng.uniform(5, 20)
            width, height = rng.uniform(40, 70, 2)
            category = int(rng.integers(1, 3))
            box = [x, y, width, height]
            annotations.append({"image_id": image, "category_id": category, "bbox": box, "id": len(annotations) + 1})
            for number, side in enumerate(sides):
                tight = (number == 1) != (image % 4 == 0)
                shift = rng.uniform(0.01, 0.04) if tight else rng.uniform(0.1, 0.2)
                moved = [x + shift * width, y - shift * height, width * (1 + shift), height]
                side.append((image, category, moved, rng.uniform(0.5, 1)))
                side.append((image, 3 - category, [x + 20, y + 20, width, height], rng.uniform(0.01, 0.4)))
    paths = []
    for name, side in zip(("before", "after"), sides, strict=True):
        columns = list(zip(*side, strict=True))
        results = Results(
            np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2]), np.array(columns[3]),
            None if name == "before" else rng.uniform(0, 1, len(side)),
        )  # fmt: skip
        paths.append(folder / f"{name}.json")
        write_results(paths[-1], results)
    truth = {
        "images": entries, "annotations": annotations,
        "categories": [{"id": 1, "name": HOSTILE}, {"id": 2, "name": QUOTED}],
    }  # fmt: skip
    (folder / "truth.json").write_text(json.dumps(truth))
    return Case(paths[0], paths[1], folder / "truth.json", folder / "images")
