"""Ablation 8: how the gain depends on how long the detector was trained.

    python -m scripts.ablations.detector --cache FOLDER --weights "4 epochs more=runs/longer/best.safetensors" ...

Measured on the Faster R-CNN as it is given, then on other weights of it, made by scripts/train_detector.py. For each a
default head is trained on its features, from every other image and its mirror image, and the stage is measured at its
defaults: nothing is chosen, so it is measured on test.
"""

from __future__ import annotations

import time
from typing import Any

from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.stage import Stage
from iou_refiner.training.loop import measure
from scripts.ablations.harness import command_line, parse
from scripts.ablations.records import Records, Run
from scripts.ablations.settings import BOTH, DETECTOR
from scripts.ablations.testbed import AP, Testbed, small_detector
from scripts.ablations.variant import Variant

_AS_GIVEN = "as given, 5 epochs"
_HEAD = Variant(views=(0, 1), share=1 / 2)


def figures_of(bed: Testbed, head: IoUHead) -> dict[str, Any]:
    """AP without and with the stage, the gain with its interval, and the agreement of scores with the true IoU."""
    change = compare(*(bed.results(Stage(head, settings)) for settings in (DETECTOR, BOTH)), bed.truth)
    sides = {"own": change.before, "moved": change.after}
    figures: dict[str, Any] = {
        side: {name: 100 * evaluation.metrics[name] for name in AP} for side, evaluation in sides.items()
    }
    low, high = change.intervals["AP"]
    figures["gain"] = {"AP": change.differences["AP"], "low": low, "high": high}
    agreement = measure(head, bed.eval_set)
    return figures | {name: agreement[name] for name in ("pearson", "pearson_score")}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--passes", type=int, default=2400, help="images every head sees in training")
    parser.add_argument("--seeds", type=int, default=1)
    options = parse(parser)
    records = Records(options.records)
    weights = [entry.partition("=") for entry in options.weights]
    detectors = {_AS_GIVEN: "faster_rcnn"} | {name: f"faster_rcnn:{file}" for name, _, file in weights}
    for variant, spec in detectors.items():
        runs = [Run("detector", "faster_rcnn", variant, seed) for seed in range(options.seeds)]
        runs = [run for run in runs if run not in records]
        if not runs:
            continue
        cache = options.cache / spec.replace("/", "_")
        bed = Testbed(small_detector(spec), cache, options.data, split="test")
        for run in runs:
            began = time.time()
            head = bed.train_head(_HEAD, run.seed, options.passes)
            records.add(run, time.time() - began, {"passes": options.passes}, figures_of(bed, head))


if __name__ == "__main__":
    main()
