"""What each part of the stage adds to a detector: the tables of docs/gains.md.

    python -m scripts.results.gain DETECTOR HEAD --cache CACHE [--data FOLDER] [--split test] [--tune] [--json FILE]

Every row differs from the detector's own suppression (``detector``) in what it names and in nothing else. "The paper's
pipeline" is Algorithms 1 and 2 of the paper with its settings, "as chosen on val" what ``train --val-ann`` chose.

DETECTOR is a spec as for --detector (examples/small_detectors.py:faster_rcnn or :yolox), HEAD a head trained by
``iou-refiner train``, CACHE the feature cache of that training (what is missing is extracted), FOLDER holds ``images``
and the annotations ``instances_val.json`` and ``instances_test.json``: coco-person unless named. Candidates,
suppression and evaluation are those of ``dump``, ``rescore`` and ``eval --baseline``; here the features are read once
for all rows. ``--tune`` prints AP over settings instead: use it on val, then report on test.

The row "isotonic class score" scores each box by the IoU that boxes of its class score have on val: the best that a
calibration, which looks at the score alone, can do. Its AP is that of the detector, whatever the data: AP of a class
asks which detection stands before which, and a rising map leaves that as it is.

Needs scipy besides the package. Time: 3 (YOLOX) to 6 minutes (Faster R-CNN) for test, 462 images, on one core from a
filled cache, 1000 bootstrap resamples a row.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iou_refiner.detector.adapter import Suppression
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training.loop import measure
from iou_refiner.training.samples import TrainingSet
from scripts.ablations.testbed import COCO_PERSON
from scripts.results.evaluator import Evaluator
from scripts.results.tables import change
from scripts.results.variants import every_candidate, one_at_a_time, variants

METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")
#: Settings of the rows, options of the command line, and their defaults.
OPTIONS = {
    "nms_threshold": 0.5,
    "rank_alpha": 0.75,
    "score_alpha": 0.5,
    "ascent_steps": 5,
    "ascent_step_size": 0.02,
    "min_gain": 0.0,
}


def tune(evaluator: Evaluator, detector: StageSettings, console: Console) -> None:
    """Print AP over one setting at a time."""
    for changes in one_at_a_time():
        results, _ = evaluator.run(Stage(evaluator.head, detector, **changes))
        metrics = evaluate(results, evaluator.truth).metrics
        console.print(json.dumps(changes), " ".join(f"{m} {100 * metrics[m]:.1f}" for m in METRICS), highlight=False)


def compare_rows(evaluator: Evaluator, rows: dict[str, StageSettings]) -> dict[str, Any]:
    """Every row compared with the detector, with the summary and the median CPU seconds an image of its stage."""
    head, detector = evaluator.head, rows["detector"]
    stages: dict[str, Suppression] = {name: Stage(head, settings) for name, settings in rows.items()}
    if head.config.deltas:
        stages |= {f"regressor alone, {n} step{'s' * (n > 1)}": evaluator.regressor(detector, n) for n in (1, 3)}
    outcomes = {name: evaluator.run(stage) for name, stage in stages.items()}
    before, seconds = outcomes["detector"]
    outcomes["isotonic class score"] = replace(before, score=evaluator.calibration()(before.score)), seconds
    return {
        name: compare(before, after, evaluator.truth).to_dict()
        | {"summary": str(getattr(stages.get(name), "summary", "")), "cpu_seconds": seconds}
        for name, (after, seconds) in outcomes.items()
    }


def made_worse(evaluator: Evaluator, rows: dict[str, StageSettings]) -> dict[str, dict[str, float]]:
    """For the rows that refine boxes in different ways: what refining does to the boxes that fit an object."""
    chosen = {name: rows[name] for name in ("ascent", "regression", "as chosen on val") if name in rows}
    chosen["regression of all candidates"] = every_candidate(rows["regression"])
    return {
        name: evaluator.made_worse(settings)
        for name, settings in chosen.items()
        if Stage(evaluator.head, settings).settings.refines
    }


def table_of(rows: dict[str, Any], title: str) -> Table:
    table = Table("", *METRICS, "AP: difference [95 %]", "AP50", "AP90", "CPU s/image", title=title)
    for name, row in rows.items():
        values = [f"{100 * row['after']['metrics'][m]:.1f}" for m in METRICS]
        differences = [change(row, m) for m in ("AP", "AP50", "AP90")]
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
    for name, default in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options, console = arguments(), Console(width=160)
    evaluator = Evaluator(options.detector, options.head, options.cache, options.data, options.split)
    # What the author's evaluation uses.
    detector = StageSettings.detector_only(nms_threshold=0.65 if options.detector.endswith(":yolox") else 0.5)
    if options.tune:
        tune(evaluator, detector, console)
        return
    chosen = {name: getattr(options, name) for name in OPTIONS}
    rows = variants(detector, StageSettings(**chosen))
    if evaluator.head.metadata.recommended:
        rows["as chosen on val"] = StageSettings(**evaluator.head.metadata.recommended)
    if options.seconds:
        seconds = evaluator.seconds(rows["the same + regression"])
        console.print("median seconds an image: detector {:.3f}, stage {:.3f}".format(*seconds))
        return
    record: dict[str, Any] = {"settings": chosen | {"detector_nms_threshold": detector.nms_threshold}}
    record["rows"] = compare_rows(evaluator, rows)
    console.print(table_of(record["rows"], f"{options.detector}, {options.data.name} {options.split}"))
    record["agreement"] = measure(evaluator.head, TrainingSet(evaluator.cache, evaluator.truth))
    record["made worse"] = made_worse(evaluator, rows)
    for name, part in {"agreement": record["agreement"], **record["made worse"]}.items():
        console.print(name, {figure: round(value, 4) for figure, value in part.items()})
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
