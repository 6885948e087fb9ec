"""What the siblings of a box are worth without any features: the table of docs/siblings.md.

    python -m scripts.results.siblings DETECTOR --work FOLDER [--data FOLDER] [--json FILE]

As ``dump``, ``train --detections``, ``rescore`` and ``eval --baseline`` do it one after the other: candidates are saved
once in FOLDER, and everything after needs neither detector nor images. Greedy NMS is what is to be beaten, at the
threshold that is best on val; Soft-NMS stands beside it. With ``--all-data FOLDER``, the head is also put to the test
set of another folder, whatever its categories.

DETECTOR is a spec as for --detector. Time: dump 1 to 3 minutes for 2,041 images, training 5, on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iou_refiner.coco import GroundTruth, Results, read_ground_truth, read_images, read_results, write_results
from iou_refiner.detector.registry import detector_from_spec
from iou_refiner.detector.sources import feature_source
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.head.checkpoint import load_head
from iou_refiner.rescoring import dump_candidates, rescore_saved
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training.from_candidates import train_from_candidates
from scripts.ablations.testbed import COCO_PERSON
from scripts.results.tables import change

METRICS = ("AP", "AP50", "AP75", "AP90")


def candidates(detector: str, data: Path, split: str, work: Path) -> tuple[Results, GroundTruth]:
    """The candidates of a split, saved as ``dump`` saves them, and its annotation."""
    ann, path = data / f"instances_{split}.json", work / f"{data.name}-{split}.json"
    if not path.exists():
        adapter = detector_from_spec(detector)
        parts = dump_candidates(feature_source(adapter, data / "images"), adapter.category_ids, read_images(ann))
        write_results(path, Results.concat(parts))
    return read_results(path), read_ground_truth(ann)


def rows_of(head_file: Path, results: Results, truth: GroundTruth, *, every: bool = False) -> dict[str, Any]:
    """Each row of the table: what it measures, and its difference from greedy NMS."""
    head = load_head(head_file)
    own = head.metadata.training["nms_threshold"]
    settings = {
        "greedy NMS": StageSettings.detector_only(nms_threshold=own),
        "Soft-NMS": StageSettings.detector_only().replace(nms="none", final_nms="soft"),
        "siblings, not moved": StageSettings.by_siblings(move=0.0),
        "siblings, as chosen on val": StageSettings().replace(**head.metadata.recommended),
    }
    rows: dict[str, Any] = {}
    before: Results | None = None
    for name, chosen in settings.items():
        began = time.process_time()
        stage = Stage(
            head, chosen.replace(all_categories=True if every and chosen.siblings else None), own_threshold=own
        )
        after = Results.concat(rescore_saved(stage, results))
        seconds = (time.process_time() - began) / len(truth.images)
        before = after if before is None else before
        rows[name] = compare(before, after, truth).to_dict() | {"cpu_seconds": seconds}
    return rows


def table_of(rows: dict[str, Any], title: str) -> Table:
    table = Table("", *METRICS, *(f"{metric}: difference [95 %]" for metric in METRICS), "CPU ms/image", title=title)
    for name, row in rows.items():
        values = [f"{100 * row['after']['metrics'][metric]:.1f}" for metric in METRICS]
        differences = [change(row, metric) for metric in METRICS]
        table.add_row(name, *values, *differences, f"{1000 * row['cpu_seconds']:.1f}")
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector")
    parser.add_argument("--work", type=Path, required=True, help="folder for candidates and head")
    parser.add_argument("--data", type=Path, default=COCO_PERSON, help="folder of images and annotations")
    parser.add_argument("--all-data", type=Path, help="another such folder, of which the test set is judged too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options, console = arguments(), Console(width=170)
    options.work.mkdir(parents=True, exist_ok=True)
    train, val, test = (candidates(options.detector, options.data, s, options.work) for s in ("train", "val", "test"))
    began = time.process_time()
    folder = options.work / f"head-{options.seed}"
    train_from_candidates(train, val, output_dir=folder, detector_name=options.detector, seed=options.seed)
    record: dict[str, Any] = {"training_cpu_seconds": time.process_time() - began, "seed": options.seed}
    head = folder / "head.safetensors"
    record["rows"] = rows_of(head, *test)
    console.print(table_of(record["rows"], f"{options.data.name} test"))
    if options.all_data:
        other = candidates(options.detector, options.all_data, "test", options.work)
        record["other"] = rows_of(head, *other, every=True)
        console.print(table_of(record["other"], f"{options.all_data.name} test, all categories"))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
