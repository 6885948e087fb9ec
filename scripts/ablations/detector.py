"""Question 8: how the gain depends on how long the detector was trained.

    python scripts/experiments/detector.py --cache FOLDER --weights "4 epochs more=runs/longer/best.safetensors" ...

Asked of the Faster R-CNN as it is given, then of other weights of it, made by scripts/train_detector.py. For each a
default head is trained on its features, of every other image and its mirror image, and the stage is measured at its
defaults: nothing is chosen, so it is measured on test.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.stage.stage import Stage
from iou_refiner.training.loop import measure
from scripts.ablations.harness import AP, BOTH, OWN, Lab, Variant, detector_of, done, keep

_GIVEN = "as given, 5 epochs"
_HEAD = Variant(views=(0, 1), share=1 / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the feature caches")
    parser.add_argument("--weights", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--passes", type=int, default=2400, help="images every head sees in training")
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    given = [("faster_rcnn", _GIVEN)] + [
        (f"faster_rcnn:{file}", name) for name, _, file in (entry.partition("=") for entry in chosen.weights)
    ]
    for spec, variant in given:
        wanted = [seed for seed in range(chosen.seeds) if (variant, seed) not in done("detector", "faster_rcnn")]
        if not wanted:
            continue
        lab = Lab(detector_of(spec), chosen.cache / spec.replace("/", "_"), split="test")
        for seed in wanted:
            began = time.time()
            head = lab.train_head(_HEAD, seed, chosen.passes)
            change = compare(*(lab.results(Stage(head, **settings)) for settings in (OWN, BOTH)), lab.truth)
            low, high = change.intervals["AP"]
            sides = {"own": change.before, "moved": change.after}
            figures: dict[str, Any] = {
                side: {name: 100 * found.metrics[name] for name in AP} for side, found in sides.items()
            }
            figures["gain"] = {"AP": change.differences["AP"], "low": low, "high": high}
            ranking = measure(head, lab.asked)
            figures |= {name: ranking[name] for name in ("pearson", "pearson_score")}
            keep("detector", "faster_rcnn", variant, seed, began, {"passes": chosen.passes}, figures)


if __name__ == "__main__":
    main()
