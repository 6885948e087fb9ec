"""The demo's picture: boxes before and after, beside the truth."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.checks import require
from iou_refiner.coco import GroundTruth, Image, Results, xywh_to_xyxy
from iou_refiner.coco.data import FloatArray
from iou_refiner.detector.images import open_image
from iou_refiner.files import write_whole
from iou_refiner.numpy_boxes import pairwise_iou

_COLUMNS = 6
_FIRST = 12  # whole images
_CLOSE_UPS = 6  # objects, half of them those that gained most, half those that lost most
_CONFIDENT = 0.5  # detections with a lower score are not drawn
_TRUTH, _BEFORE, _AFTER, _LOSS = "#ffffff", "#ffb000", "#00d5ff", "#ff5a5a"


@dataclass(frozen=True, eq=False)
class _Pair:
    """An object with the box nearest to it before and after, xyxy, and their IoU with it."""

    image: Image
    truth: FloatArray
    before: FloatArray
    after: FloatArray
    iou: tuple[float, float]

    @property
    def gain(self) -> float:
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
    pairs = _pairs(ground_truth, before, after)
    first = ground_truth.images[:_FIRST]
    by_gain = sorted(pairs, key=lambda pair: pair.gain)
    half = min(_CLOSE_UPS, len(by_gain)) // 2
    close_ups = by_gain[len(by_gain) - half :][::-1] + by_gain[:half]
    rows = -(-len(first) // _COLUMNS) + (1 if close_ups else 0)
    figure = figure_of(figsize=(2.5 * _COLUMNS, 2.62 * rows + 1.0), facecolor="#111111", layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, first, strict=False):
        axis.imshow(open_image(images, image), extent=(0, image.width, image.height, 0))
        for pair in pairs:
            if pair.image == image:
                _draw(axis, pair, width=1.3)
    for axis, pair in zip(axes[-1], close_ups, strict=False):
        axis.imshow(open_image(images, pair.image), extent=(0, pair.image.width, pair.image.height, 0))
        _draw(axis, pair, width=2.2)
        _zoom(axis, pair)
    figure.suptitle(_legend(len(first), half, caption), color="white", fontsize=11)
    _save(figure, path)


def _legend(first: int, half: int, caption: str) -> str:
    return (
        "white: truth    orange: the detector alone    blue: with IoU-guided NMS and refinement    "
        "numbers: IoU before → after\n"
        f"The first {first} images of the test split; last row: the {half} objects that gained most, "
        f"then the {half} that lost most.\n{caption[0].upper()}{caption[1:]}."
    )


def _pairs(ground_truth: GroundTruth, before: Results, after: Results) -> list[_Pair]:
    """Each object that has a confident box of IoU above 0 both before and after."""
    objects, pairs = xywh_to_xyxy(ground_truth.bbox), []
    sides = [results[results.score >= _CONFIDENT] for results in (before, after)]
    rows_of = [side.by_image() for side in sides]
    nothing = np.empty(0, np.int64)
    of_image = ground_truth.by_image()
    for image in ground_truth.images:
        boxes = [
            xywh_to_xyxy(side.bbox[rows.get(image.id, nothing)]) for side, rows in zip(sides, rows_of, strict=True)
        ]
        if not all(map(len, boxes)):
            continue
        ious = [pairwise_iou(objects[of_image[image.id]], side) for side in boxes]
        for truth, *iou in zip(objects[of_image[image.id]], *ious, strict=True):
            best = [int(values.argmax()) for values in iou]
            reached = float(iou[0][best[0]]), float(iou[1][best[1]])
            if min(reached) > 0:
                pairs.append(_Pair(image, truth, boxes[0][best[0]], boxes[1][best[1]], reached))
    return pairs


def _draw(axis: Any, pair: _Pair, *, width: float) -> None:
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
        color=_AFTER if pair.gain >= 0 else _LOSS, bbox={"fc": "black", "ec": "none", "alpha": 0.65, "pad": 1.0},
    )  # fmt: skip


def _zoom(axis: Any, pair: _Pair) -> None:
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
