"""The README's picture from what ``iou-refiner demo`` left: boxes before and after on six objects, as one small PNG.

    iou-refiner demo && python -m scripts.results.picture demo docs/figures/before-after.png

Of the objects that a box hit before and after, the six are those at fixed ranks of the gain, from the most improved to
one that got worse: what is typical, not only what is best.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from iou_refiner.coco import read_ground_truth, read_results
from iou_refiner.demo.picture import draw_close_up, pairs_of

# Ranks among all pairs, from the largest gain (0) to the largest loss (1).
_RANKS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.97)


def main(folder: Path, output: Path) -> None:
    truth = read_ground_truth(folder / "data" / "test.json")
    before, after = (read_results(folder / f"{name}.json") for name in ("before", "after"))
    pairs = sorted(pairs_of(truth, before, after), key=lambda pair: -pair.gain)
    chosen = [pairs[round(rank * (len(pairs) - 1))] for rank in _RANKS]
    figure = Figure(figsize=(9, 1.85), facecolor="#111111", layout="constrained")
    for axis, pair in zip(figure.subplots(1, len(chosen)), chosen, strict=True):
        draw_close_up(axis, pair, folder / "data")
    figure.suptitle(
        "white: the truth, orange: before, blue: after; numbers: IoU with the truth, red where it fell",
        color="white", fontsize=8,
    )  # fmt: skip
    figure.savefig(output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
