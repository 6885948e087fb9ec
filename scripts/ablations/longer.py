"""Question 9: what of questions 1 to 4 lasts, asked of heads trained as long as that of the README.

    python scripts/experiments/longer.py --cache cache/faster_rcnn --heads "mix 0=runs/unmixed/head.safetensors" ...

Trains nothing: each head is made by the command of the README with the options that name it, and is measured on val in
what every head of the laboratory is measured in.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from iou_refiner.head.iou_head import IoUPredictor
from scripts.ablations.harness import Lab, detector_of, done, keep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--seed", type=int, default=0, help="that the heads were trained with")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    lab = Lab(detector_of("faster_rcnn"), chosen.cache)
    for variant, _, file in (entry.rpartition("=") for entry in chosen.heads):
        if (variant, chosen.seed) not in done("longer", "faster_rcnn"):
            began = time.time()
            keep("longer", "faster_rcnn", variant, chosen.seed, began, {}, lab.figures(IoUPredictor.load(file)))


if __name__ == "__main__":
    main()
