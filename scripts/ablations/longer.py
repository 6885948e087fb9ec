"""Ablation 9: what of ablations 1 to 4 lasts, in heads trained as long as that of docs/gains.md.

    python -m scripts.ablations.longer --cache cache/faster_rcnn --heads "mix 0=runs/unmixed/head.safetensors" ...

Trains nothing: each head is made by the command of docs/gains.md with the options that its name gives, and is measured
on val in what every head of a training ablation is measured in.
"""

from __future__ import annotations

import time

from iou_refiner.head.checkpoint import load_head
from scripts.ablations.harness import command_line, parse
from scripts.ablations.records import Records, Run
from scripts.ablations.testbed import Testbed, small_detector


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--heads", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--seed", type=int, default=0, help="that the heads were trained with")
    options = parse(parser)
    records = Records(options.records)
    bed = Testbed(small_detector("faster_rcnn"), options.cache, options.data)
    for variant, _, file in (entry.rpartition("=") for entry in options.heads):
        run = Run("longer", "faster_rcnn", variant, options.seed)
        if run not in records:
            began = time.time()
            figures = bed.measure_head(load_head(file))
            records.add(run, time.time() - began, {}, figures)


if __name__ == "__main__":
    main()
