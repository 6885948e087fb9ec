"""Ablation 3: which features of the detector a box is pooled from, and where.

How many levels, how much of what surrounds the box, how many bins, which alignment of cells.
"""

from __future__ import annotations

from scripts.ablations.harness import run_training_ablation
from scripts.ablations.variant import Variant

VARIANTS = {
    "default: 3 levels, 1.5 of the box, 7 x 7": Variant(),
    "1 level, FPN's": Variant(head={"levels": 1}),
    "the box alone": Variant(head={"context": 1.0}),
    "2 of the box": Variant(head={"context": 2.0}),
    "5 x 5": Variant(head={"output_size": 5}),
    "9 x 9": Variant(head={"output_size": 9}),
    "cells at i * stride": Variant(head={"aligned": False}),
}

if __name__ == "__main__":
    run_training_ablation("features", VARIANTS, __doc__)
