"""What each part of the stage adds to a detector: the tables of the README.

    python scripts/gain.py DETECTOR HEAD --cache CACHE [--data FOLDER] [--split test] [--tune] [--json FILE]

Every row differs from the detector's own suppression (``detector``) in what it names and in nothing else; the last row
is what ``train --val-ann`` chose for the head. DETECTOR is a spec as for --detector
(examples/small_detectors.py:faster_rcnn or :yolox), HEAD a head trained by ``iou-refiner train``, CACHE
the feature cache of that training (what is missing is extracted), FOLDER holds ``images`` and the annotations
``instances_val.json`` and ``instances_test.json``: coco-person unless named. Candidates, suppression and evaluation are
those of ``dump``, ``rescore`` and ``eval --baseline``; here the features are read once for all rows. ``--tune`` prints
AP over settings instead: use it on val, then report on test.

The row "isotonic class score" scores each box by the IoU that boxes of its class score have on val: the best that a
calibration, which looks at the score alone, can do. Its AP is that of the detector, whatever the data: AP of a class
asks which detection stands before which, and a rising map leaves that as it is.

Needs scipy besides the package. Time: 3 (YOLOX) to 6 minutes (Faster R-CNN) for test, 462 images, on one core from a
filled cache, 1000 bootstrap resamples a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.small_detectors import SHARED
from iou_refiner.detector.adapter import Suppression
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.stage.stage import Stage
from iou_refiner.training.loop import measure
from iou_refiner.training.samples import TrainingSet
from scripts.results.rows import Bench, variants

COCO_PERSON = SHARED / "data" / "coco-person"
METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")
# A stage that keeps and moves every candidate.
EVERY: dict[str, Any] = {"nms": "none", "refine_top": 10_000, "max_detections": 10_000}


def tune(bench: Bench, own: float) -> Iterator[tuple[str, dict[str, float]]]:
    """AP over one setting at a time, on val."""
    plain: dict[str, Any] = {"nms": "greedy", "nms_threshold": own, "moves": 0, "steps": 0, "score_alpha": 0.0}
    guided = {"nms": "iou", "moves": 0, "steps": 0, "score_alpha": 0.0}
    rows = [plain] + [plain | {"score_alpha": alpha} for alpha in (0.3, 0.5, 0.7)]
    rows += [guided | {"nms_threshold": 0.5, "rank_alpha": alpha} for alpha in (0.25, 0.5, 0.75, 1.0)]
    rows += [guided | {"nms_threshold": threshold, "rank_alpha": 0.5} for threshold in (0.4, 0.6, 0.65)]
    rows += [plain | {"steps": 5, "step_size": size} for size in (0.025, 0.05, 0.1, 0.2)]
    rows += [plain | {"steps": 5, "step_size": 0.05, "margin": margin} for margin in (0.005, 0.01, 0.02)]
    for row in rows:
        results, _ = bench.through(Stage(bench.head, **row))
        yield json.dumps(row), evaluate(results, bench.truth).metrics


def record_of(bench: Bench, rows: dict[str, dict[str, Any]], own: float) -> dict[str, Any]:
    """Every row of the table compared with the detector, what its stage says, and its median CPU seconds an image."""
    stages: dict[str, Suppression] = {name: Stage(bench.head, **settings) for name, settings in rows.items()}
    if bench.head.regress:
        stages |= {f"regressor alone, {n} step{'s' * (n > 1)}": bench.regressor(own, n) for n in (1, 3)}
    found = {name: bench.through(stage) for name, stage in stages.items()}
    before, seconds = found["detector"]
    found["isotonic class score"] = replace(before, score=bench.calibration()(before.score)), seconds
    return {
        name: compare(before, after, bench.truth).to_dict()
        | {"summary": str(getattr(stages.get(name), "summary", "")), "cpu_seconds": seconds}
        for name, (after, seconds) in found.items()
    }


def table_of(record: dict[str, Any], title: str) -> Table:
    table = Table("", *METRICS, "AP: difference [95 %]", "AP50", "AP90", "CPU s/image", title=title)
    for name, row in record.items():
        values = [f"{100 * row['after']['metrics'][m]:.1f}" for m in METRICS]
        differences = [
            f"{100 * row['differences'][m]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for m in ("AP", "AP50", "AP90")
            for low, high in [row["intervals"][m]]
        ]
        table.add_row(name, *values, *differences, f"{row['cpu_seconds']:.4f}")
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector")
    parser.add_argument("head", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=COCO_PERSON, help="folder of images and annotations")
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", action="store_true", help="only time detector and stage; on an idle machine")
    parser.add_argument("--alpha", type=float, default=0.5, help="score_alpha of the rescoring rows")
    for name, value in (("nms_threshold", 0.5), ("rank_alpha", 0.75), ("step_size", 0.02), ("margin", 0.0)):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    bench = Bench(options.detector, options.head, options.cache, options.data, options.split)
    own = 0.65 if options.detector.endswith(":yolox") else 0.5  # what the author's evaluation uses
    console = Console(width=160)
    if options.tune:
        for name, metrics in tune(bench, own):
            console.print(name, " ".join(f"{m} {100 * metrics[m]:.1f}" for m in METRICS), highlight=False)
        return
    chosen = {name: getattr(options, name) for name in ("nms_threshold", "rank_alpha", "step_size", "margin", "steps")}
    rows = variants(own, options.alpha, chosen)
    if bench.head.recommended:
        rows["as chosen on val"] = bench.head.recommended
    if options.seconds:
        detector, stage = bench.seconds(rows["the same + regression"])
        console.print(f"median seconds an image: detector {detector:.3f}, stage {stage:.3f}")
        return
    record: dict[str, Any] = {"settings": chosen | {"score_alpha": options.alpha, "own_nms": own}}
    record["rows"] = record_of(bench, rows, own)
    console.print(table_of(record["rows"], f"{options.detector}, {options.data.name} {options.split}"))
    record["ranking"] = measure(bench.head, TrainingSet(bench.cache, bench.truth))
    asked = {name: rows[name] for name in ("ascent", "regression", "as chosen on val") if name in rows}
    asked["regression of all candidates"] = rows["regression"] | EVERY
    moving = {name: settings for name, settings in asked.items() if Stage(bench.head, **settings).moves_boxes}
    record["made worse"] = {name: bench.made_worse(settings) for name, settings in moving.items()}
    for name, part in {"ranking": record["ranking"], **record["made worse"]}.items():
        console.print(name, {figure: round(value, 4) for figure, value in part.items()})
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
