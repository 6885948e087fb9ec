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
from lab import BOTH, RANKED, Lab, Variant, detector_of, done, keep

from iou_refiner.bootstrap import compare
from iou_refiner.stage import Stage
from iou_refiner.training import measure

_GIVEN = "as given, 5 epochs"
_OWN: dict[str, Any] = RANKED | {"nms": "greedy", "nms_threshold": 0.5, "score_alpha": 0.0}
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
    for spec, name in given:
        lab = Lab(detector_of(spec), chosen.cache / spec.replace("/", "_"), split="test")
        for seed in range(chosen.seeds):
            if (name, seed) in done("detector", "faster_rcnn"):
                continue
            began = time.time()
            head = lab.train_head(_HEAD, seed, chosen.passes)
            own, moved = Stage(head, **_OWN), Stage(head, **BOTH)
            change = compare(lab.results(own), lab.results(moved), lab.truth)
            low, high = change.intervals["AP"]
            figures: dict[str, Any] = {"own": lab.ap(own), "moved": lab.ap(moved)}
            figures["gain"] = {"AP": change.differences["AP"], "low": low, "high": high}
            ranking = measure(head, lab.asked)
            figures |= {name: ranking[name] for name in ("pearson", "pearson_score")}
            keep("detector", "faster_rcnn", name, seed, began, {"passes": chosen.passes}, figures)


if __name__ == "__main__":
    main()
