"""What each part of the stage adds to a detector on coco-person: the tables of the README.

    python scripts/coco_person.py DETECTOR HEAD --cache CACHE [--split test] [--tune] [--json FILE]

Every row differs from the detector's own suppression (``detector``) in what it names and in nothing else; the last row
is what ``train --val-ann`` chose for the head. DETECTOR is a spec as for --detector
(examples/coco_person.py:faster_rcnn or :yolox), HEAD a head trained by ``iou-refiner train``, CACHE
the feature cache of that training (what is missing is extracted). Candidates, suppression and evaluation are those of
``dump``, ``rescore`` and ``eval --baseline``; here the features are read once for all rows. ``--tune`` prints AP over
settings instead: use it on val, then report on test.

Time: about 4 minutes for test (462 images) on 2 cores from a filled cache, 1000 bootstrap resamples a row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from iou_refiner.bootstrap import compare
from iou_refiner.boxes import clip_boxes
from iou_refiner.coco import GroundTruth, Results, read_ground_truth
from iou_refiner.data import Detections, FeatureMaps
from iou_refiner.detectors import detector_from_spec
from iou_refiner.evaluation import evaluate
from iou_refiner.extraction import FeatureCache, extract_image
from iou_refiner.predictor import IoUPredictor
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage import Stage
from iou_refiner.targets import TrainingSet, true_iou
from iou_refiner.training import measure

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco-person"
# The detector's own suppression: what its author's evaluation uses.
OWN_NMS = {"faster_rcnn": 0.5, "yolox": 0.65}
METRICS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")


def variants(own: float, alpha: float, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the stage for each row."""
    # Named in full: what is left out would be what the head recommends.
    keep = {"nms": "greedy", "nms_threshold": own, "moves": 0, "steps": 0, "margin": 0.0, "score_alpha": 0.0}
    guided = {"nms": "iou", "nms_threshold": settings["nms_threshold"], "rank_alpha": settings["rank_alpha"]}
    ascent = {"steps": settings["steps"], "step_size": settings["step_size"], "margin": settings["margin"]}
    moving = {"moves": 1}
    rescoring = {"score_alpha": alpha}
    return {
        "detector": keep,
        "Soft-NMS": keep | {"nms": "soft"},
        "rescoring": keep | rescoring,
        "IoU-guided NMS": keep | guided,
        "ascent": keep | ascent,
        "regression": keep | moving,
        "rescoring + IoU-guided NMS": keep | rescoring | guided,
        "the same + ascent": keep | rescoring | guided | ascent,
        "the same + regression": keep | rescoring | guided | moving,
    }


class Bench:
    """One detector, one head, one split, features from the cache."""

    def __init__(self, spec: str, head: Path, cache: Path, split: str):
        self.adapter = detector_from_spec(spec)
        self.truth: GroundTruth = read_ground_truth(SHARED / f"instances_{split}.json")
        self.cache = FeatureCache(cache, self.adapter)
        for _ in self.cache.fill(SHARED / "images", self.truth.images):
            pass
        self.look = lambda image: self.cache.load(image.id)
        self.candidates = Results.concat(dump_candidates(self.look, self.adapter.category_ids, self.truth))
        self.head = IoUPredictor.load(head)

    def regressor(self, own: float, steps: int) -> Results:
        """A regressor in the manner of RefineBox: greedy NMS by class score, then so many steps, taken unasked."""
        unmoved = Stage(self.head, nms="greedy", nms_threshold=own, moves=0, steps=0, score_alpha=0.0)

        def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            (kept,) = unmoved(features, candidates)
            pyramid, size = self.head.encode(features), features.image_sizes[0]
            for _ in range(steps):
                moved = self.head.move(pyramid, kept.boxes, torch.zeros_like(kept.labels))
                kept = kept.replace(boxes=clip_boxes(moved, size))
            return [kept]

        return Results.concat(rescore(self.look, self.adapter.category_ids, stage, self.candidates, self.truth))

    def run(self, **settings: Any) -> tuple[Results, Stage]:
        """The results of one setting of the stage."""
        stage = Stage(self.head, **settings)
        parts = rescore(self.look, self.adapter.category_ids, stage, self.candidates, self.truth)
        return Results.concat(parts), stage

    def seconds(self, settings: dict[str, Any], images: int = 40) -> tuple[float, float]:
        """Median seconds an image of the detector and of the stage, interleaved."""
        stage, detector, added = Stage(self.head, **settings), [], []
        for image in self.truth.images[:images]:
            began = time.perf_counter()
            extraction = extract_image(self.adapter, SHARED / "images", image)
            middle = time.perf_counter()
            stage(extraction.features, [extraction.candidates])
            detector.append(middle - began)
            added.append(time.perf_counter() - middle)
        return float(np.median(detector)), float(np.median(added))

    def made_worse(self, settings: dict[str, Any]) -> dict[str, float]:
        """Of the detections that fit an object (true IoU > 0.5) and were moved: the share that fits it less."""
        data = TrainingSet(self.cache, self.truth)
        pairs = []
        still, moving = Stage(self.head, **settings | {"moves": 0, "steps": 0}), Stage(self.head, **settings)
        for index in range(len(data)):
            extraction, objects = data.load(index)
            given = extraction.candidates
            given = given.replace(source=torch.arange(len(given)))
            before, after = (stage(extraction.features, [given])[0] for stage in (still, moving))
            before = before[torch.isin(before.source, after.source)]
            after = after[torch.isin(after.source, before.source)]  # boxes that met on one object are one by now
            before, after = before[before.source.argsort()], after[after.source.argsort()]
            moved = (before.boxes != after.boxes).any(1)
            pairs.append(torch.stack([true_iou(d.boxes[moved], d.labels[moved], objects) for d in (before, after)]))
        before, after = torch.cat(pairs, 1)
        judged = torch.isfinite(before) & torch.isfinite(after) & (before > 0.5)
        change = (after - before)[judged]
        return {
            "moved": int(judged.sum()), "worse": (change < 0).float().mean().item(),
            "worse by over .02": (change < -0.02).float().mean().item(), "mean change": change.mean().item(),
        }  # fmt: skip


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
        results, _ = bench.run(**row)
        yield json.dumps(row), evaluate(results, bench.truth).metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector")
    parser.add_argument("head", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", action="store_true", help="only time detector and stage; on an idle machine")
    parser.add_argument("--alpha", type=float, default=0.5, help="score_alpha of the rescoring rows")
    for name, value in (("nms_threshold", 0.5), ("rank_alpha", 0.75), ("step_size", 0.05), ("margin", 0.0)):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=value)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options.detector, options.head, options.cache, options.split)
    own = OWN_NMS[options.detector.rpartition(":")[2]]
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
    table = Table("", *METRICS, "AP: difference [95 %]", "AP50", "AP90", title=f"{options.detector}, {options.split}")
    record: dict[str, Any] = {"settings": chosen | {"score_alpha": options.alpha, "own_nms": own}, "rows": {}}
    before, _ = bench.run(**rows["detector"])
    found: dict[str, tuple[Results, str]] = {}
    for name, settings in rows.items():
        after, stage = bench.run(**settings)
        found[name] = after, str(stage.summary)
    if bench.head.regress:
        for steps in (1, 3):
            found[f"regressor alone, {steps} step{'s' * (steps > 1)}"] = bench.regressor(own, steps), ""
    for name, (after, summary) in found.items():
        comparison = compare(before, after, bench.truth)
        values = [f"{100 * comparison.after.metrics[m]:.1f}" for m in METRICS]
        differences = [
            f"{100 * comparison.differences[m]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for m in ("AP", "AP50", "AP90")
            for low, high in [comparison.intervals[m]]
        ]
        table.add_row(name, *values, *differences)
        record["rows"][name] = comparison.to_dict() | {"summary": summary}
    console.print(table)
    record["ranking"] = measure(bench.head, TrainingSet(bench.cache, bench.truth))
    record["ascent"] = bench.made_worse(rows["ascent"])
    record["regression"] = bench.made_worse(rows["regression"])
    for part in ("ranking", "ascent", "regression"):
        console.print(part, {name: round(value, 4) for name, value in record[part].items()})
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
