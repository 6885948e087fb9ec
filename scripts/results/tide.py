"""The report's kinds of error beside those of TIDE's authors (pip install tidecv), on the same files.

    python -m scripts.results.tide RESULTS.json --ann ANNOTATION.json

Both judge at IoU 0.5 and up to 0.1 as background. tidecv reads COCO's crowds as ignored regions, as here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.coco import GroundTruth, Results, read_ground_truth, read_results
from iou_refiner.evaluation.ap import match
from iou_refiner.reporting.errors import find_errors
from iou_refiner.reporting.matching import Matching

_NAMES = {
    "localisation": "Loc", "classification": "Cls", "duplicate": "Dupe", "background": "Bkg", "both": "Both",
    "missed": "Miss",
}  # fmt: skip
_MOST = 100  # detections of an image that count, as in COCO and in tidecv


def theirs(results: Results, truth: GroundTruth) -> tuple[dict[str, float], dict[str, int]]:
    """Cost in AP50 points and number of each kind, by tidecv."""
    from tidecv import TIDE
    from tidecv.data import Data

    annotated, detected = Data("gt"), Data("detections")
    for category in truth.categories:
        annotated.add_class(category.id, category.name)
    for image in truth.images:
        annotated.add_image(image.id, image.file_name)
    for row in range(len(truth)):
        add = annotated.add_ignore_region if truth.iscrowd[row] else annotated.add_ground_truth
        add(int(truth.image_id[row]), int(truth.category_id[row]), truth.bbox[row].tolist())
    for row in range(len(results)):
        detected.add_detection(
            int(results.image_id[row]), int(results.category_id[row]), float(results.score[row]),
            results.bbox[row].tolist(),
        )  # fmt: skip
    tide: Any = TIDE()
    with contextlib.redirect_stdout(io.StringIO()):
        run = tide.evaluate(annotated, detected, mode=TIDE.BOX)
    costs = {kind.short_name: float(cost) for kind, cost in run.fix_main_errors(progressive=False).items()}
    return costs, {kind.short_name: len(errors) for kind, errors in run.error_dict.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("results", type=Path)
    arguments.add_argument("--ann", type=Path, required=True)
    chosen = arguments.parse_args()
    truth, results = read_ground_truth(chosen.ann), read_results(chosen.results)
    rows = [rows[np.argsort(-results.score[rows], kind="stable")[:_MOST]] for rows in results.by_image().values()]
    results = results[np.sort(np.concatenate(rows))]
    ours = find_errors(Matching.of(match(results, truth, _MOST)), results, truth)
    costs, counts = theirs(results, truth)
    print("| kind | ours, AP50 | tidecv | ours, number | tidecv |\n|---|---:|---:|---:|---:|")
    for kind in ours.kinds:
        name = _NAMES[kind.name]
        print(f"| {kind.name} | {100 * kind.cost:.2f} | {costs[name]:.2f} | {kind.count:,} | {counts[name]:,} |")


if __name__ == "__main__":
    main()
