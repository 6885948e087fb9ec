"""The demo's picture: boxes before and after, beside the truth, those that got worse among them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iou_refiner.checks import require
from iou_refiner.coco import GroundTruth, Image, Results, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray, IntArray
from iou_refiner.detector.images import open_image
from iou_refiner.evaluation.true_iou import match_boxes
from iou_refiner.files import write_whole

_COLUMNS = 6
_FIRST = 12  # whole images
_CLOSE_UPS = 6  # objects, half of them those that gained most, half those that lost most
_CONFIDENT = 0.5  # detections with a lower score are not drawn
_TRUTH, _BEFORE, _AFTER, _BETTER, _WORSE = "#ffffff", "#ffb000", "#00d5ff", "#5ee687", "#ff6b6b"


@dataclass(frozen=True, eq=False)
class Pair:
    """An object with its box before and after, xyxy, and their IoU with it."""

    image: Image
    truth: FloatArray
    before: FloatArray
    after: FloatArray
    iou: tuple[float, float]

    @property
    def gain(self) -> float:
        """How much better the box fits after than before; negative where it fits worse."""
        return self.iou[1] - self.iou[0]


def save_picture(
    path: Path, images: Path, ground_truth: GroundTruth, before: Results, after: Results, caption: str
) -> None:
    """Draw the first test images, and close-ups of the objects that gained and that lost most.

    Args:
        path: of the PNG; written beside and renamed.
        images: folder of the images.
        ground_truth: the annotation.
        before, after: two sets of detections; those of a score below one half are left out.
        caption: what the data is.
    """
    figure_of = require("matplotlib.figure", extra="demo", purpose="The demo's picture").Figure
    pairs = pairs_of(ground_truth, before, after)
    first = ground_truth.images[:_FIRST]
    by_gain = sorted(pairs, key=lambda pair: pair.gain)
    half = min(_CLOSE_UPS, len(by_gain)) // 2
    close_ups = by_gain[len(by_gain) - half :][::-1] + by_gain[:half]
    rows = -(-len(first) // _COLUMNS) + (1 if close_ups else 0)
    figure = figure_of(figsize=(2.5 * _COLUMNS, 2.62 * rows + 1.3), facecolor="#111111", layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, first, strict=False):
        axis.imshow(open_image(images, image), extent=(0, image.width, image.height, 0))
        for pair in pairs:
            if pair.image == image:
                _draw(axis, pair, width=1.3)
    for axis, pair in zip(axes[-1], close_ups, strict=False):
        draw_close_up(axis, pair, images)
    figure.suptitle(_legend(pairs, len(first), half, caption), color="white", fontsize=11)
    _save(figure, path)


def draw_close_up(axis: Any, pair: Pair, images: Path) -> None:
    """An object from near, with its box before and after.

    Args:
        axis: of matplotlib.
        pair: what to draw.
        images: folder of the images.
    """
    axis.set_axis_off()
    axis.imshow(open_image(images, pair.image), extent=(0, pair.image.width, pair.image.height, 0))
    _draw(axis, pair, width=2.2)
    _zoom(axis, pair)


def _legend(pairs: list[Pair], first: int, half: int, caption: str) -> str:
    return "\n".join(
        [
            "boxes: white the truth, orange the detector alone, blue with IoU-guided NMS and refinement",
            "numbers: IoU with the truth, before → after; green where the box fits better, red where it fits worse",
            *([_balance(pairs)] if pairs else []),
            f"The first {first} images of the test split; last row: the {half} objects that gained most, "
            f"then the {half} that lost most. {caption[0].upper()}{caption[1:]}.",
        ]
    )


def _balance(pairs: list[Pair]) -> str:
    """How many boxes fit better and how many worse, and why both are shown."""
    better, worse = sum(pair.gain > 0 for pair in pairs), sum(pair.gain < 0 for pair in pairs)
    before, after = np.mean([pair.iou for pair in pairs], axis=0)
    return (
        f"Of {len(pairs):,} objects with a box before and after, {better:,} fit better and {worse:,} worse, "
        f"mean IoU {before:.3f} → {after:.3f}: a change on average, so both kinds are shown."
    )


def pairs_of(ground_truth: GroundTruth, before: Results, after: Results) -> list[Pair]:
    """Each object that has a confident box both before and after.

    The box of an object is, among those whose best object of their class it is, the one that fits it best: a box of a
    neighbour is never taken for it.
    """
    objects, pairs = xywh_to_xyxy(ground_truth.bbox), []
    sides = [results[results.score >= _CONFIDENT] for results in (before, after)]
    rows_of = [side.by_image() for side in sides]
    nothing = np.empty(0, np.int64)
    gt_rows = ground_truth.by_image()
    for image in ground_truth.images:
        here = [side[rows.get(image.id, nothing)] for side, rows in zip(sides, rows_of, strict=True)]
        gt = gt_rows[image.id]
        labels, ignored = ground_truth.category_id[gt], ground_truth.iscrowd[gt]
        of_side = []
        for side in here:
            boxes = xywh_to_xyxy(side.bbox)
            iou, best = match_boxes(boxes, side.category_id, objects[gt], labels, ignored)
            of_side.append(_best_of_each(boxes, iou, best))
        for index in sorted(of_side[0].keys() & of_side[1].keys()):
            (old, iou_old), (new, iou_new) = (side[index] for side in of_side)
            pairs.append(Pair(image, objects[gt[index]], old, new, (iou_old, iou_new)))
    return pairs


def _best_of_each(boxes: FloatArray, iou: NDArray[np.floating], best: IntArray) -> dict[int, tuple[FloatArray, float]]:
    """For each object that some box meets, the box that fits it best of those it is the best object of, and the IoU."""
    chosen: dict[int, tuple[FloatArray, float]] = {}
    for row in np.flatnonzero(iou > 0):  # NaN, not judged, is not above 0
        index = int(best[row])
        if index not in chosen or iou[row] > chosen[index][1]:
            chosen[index] = boxes[row], float(iou[row])
    return chosen


def _draw(axis: Any, pair: Pair, *, width: float) -> None:
    patches = require("matplotlib.patches", extra="demo", purpose="The demo's picture")
    outlines = ((pair.truth, _TRUTH, "--"), (pair.before, _BEFORE, "-"), (pair.after, _AFTER, "-"))
    for (left, top, right, bottom), colour, style in outlines:
        axis.add_patch(
            patches.Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, ls=style, lw=width)
        )
    top = min(pair.truth[1], pair.before[1], pair.after[1])
    label = f"{pair.iou[0]:.2f} → {pair.iou[1]:.2f}"
    axis.text(
        pair.truth[0], max(top - 2, 9), label, fontsize=7.5, va="bottom", clip_on=True,
        color=_label_colour(pair.gain), bbox={"fc": "black", "ec": "none", "alpha": 0.65, "pad": 1.0},
    )  # fmt: skip


def _label_colour(gain: float) -> str:
    return _BETTER if gain > 0 else _WORSE if gain < 0 else _TRUTH


def _zoom(axis: Any, pair: Pair) -> None:
    boxes = np.stack([pair.truth, pair.before, pair.after])
    center = (boxes[:, :2].min(0) + boxes[:, 2:].max(0)) / 2
    half = 0.7 * (boxes[:, 2:].max(0) - boxes[:, :2].min(0)).max()
    axis.set_xlim(center[0] - half, center[0] + half)
    axis.set_ylim(center[1] + half, center[1] - half)
    axis.set_facecolor("black")


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(
        drawn, format="png", dpi=100, metadata={"Software": None}
    )  # no version inside: same input, same bytes
    write_whole(path, drawn.getvalue())
