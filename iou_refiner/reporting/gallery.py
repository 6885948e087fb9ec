"""The images that changed most, for better and for worse, with the boxes that made the difference."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.checks import require, shown
from iou_refiner.coco import GroundTruth, Image, Results
from iou_refiner.coco.data import IntArray
from iou_refiner.detector.images import ImageFolder
from iou_refiner.progress import Progress, no_progress
from iou_refiner.reporting.facts import Facts, Side

MOST_IMAGES = 12  # of each gallery
_MOST_BOXES = 100  # drawn of one side in one image
_LONGEST_SIDE = 480  # pixels of an embedded photograph
_QUALITY = 72  # of its JPEG


@dataclass(frozen=True)
class DrawnBox:
    """A box over a photograph, in pixels of the image.

    Args:
        x, y, width, height: as in COCO.
        hit: an object, or a detection matched with one at IoU 0.5.
        title: what it is, in words.
    """

    x: float
    y: float
    width: float
    height: float
    hit: bool
    title: str


@dataclass(frozen=True)
class GalleryImage:
    """A photograph with its boxes.

    Args:
        id, name, width, height: of the image.
        ap: AP of this image alone, before and after, fractions.
        photograph: a JPEG as ``data:`` URL.
        truth, before, after: the boxes.
    """

    id: int
    name: str
    width: int
    height: int
    ap: tuple[float, float]
    photograph: str
    truth: tuple[DrawnBox, ...]
    before: tuple[DrawnBox, ...]
    after: tuple[DrawnBox, ...]


@dataclass(frozen=True)
class Galleries:
    """The images that gained and those that lost most.

    Args:
        gained, lost: at most 12 each, the largest change first.
        counts: how many images have a higher and a lower AP after than before, in all.
        scores: the score from which on boxes that hit no object are drawn, before and after.
    """

    gained: tuple[GalleryImage, ...]
    lost: tuple[GalleryImage, ...]
    counts: tuple[int, int]
    scores: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Which images are shown, without the pictures."""
        shown_images = {"gained": self.gained, "lost": self.lost}
        return {name: [image.id for image in images] for name, images in shown_images.items()} | {
            "counts": list(self.counts),
            "scores": list(self.scores),
        }


def make_galleries(
    facts: Facts,
    before: Results,
    after: Results,
    ground_truth: GroundTruth,
    images: str | Path,
    progress: Progress = no_progress,
) -> Galleries:
    """Choose the images, read them, and collect their boxes.

    Every box that hits an object is drawn. Those that hit none are drawn from the score on at which precision and
    recall balance best (the best F1 at IoU 0.5), each side from its own: a new score has another scale.

    Args:
        facts: measured on the rest of the arguments.
        before, after, ground_truth: the detections and the annotation.
        images: folder of the images; only those that are shown are read.
        progress: see :class:`Progress`.

    Raises:
        DataError: an image to be shown is missing or unreadable. MissingPackageError: Pillow is missing.
    """
    require("PIL.Image", extra="report", purpose="The galleries of the report")
    gained, lost = most_changed(facts)
    folder, entries = ImageFolder(images), {image.id: image for image in ground_truth.images}
    scores = best_score(facts.before), best_score(facts.after)
    chosen = [*gained, *lost]
    drawn = []
    for done, index in enumerate(chosen):
        progress("drawing", done, len(chosen))
        image = entries[facts.image_ids[index]]
        sides = ((facts.before, before, scores[0]), (facts.after, after, scores[1]))
        drawn.append(
            GalleryImage(
                image.id,
                shown(image.file_name),
                image.width,
                image.height,
                (float(facts.before.ap_of_image[index]), float(facts.after.ap_of_image[index])),
                _photograph(folder, image),
                _objects(ground_truth, facts.before, index),
                *(_detections(side, results, index, score, ground_truth) for side, results, score in sides),
            )
        )
    progress("drawing", len(chosen), len(chosen))
    change = facts.after.ap_of_image - facts.before.ap_of_image
    counts = int((change > 0).sum()), int((change < 0).sum())
    return Galleries(tuple(drawn[: len(gained)]), tuple(drawn[len(gained) :]), counts, scores)


def most_changed(facts: Facts) -> tuple[list[int], list[int]]:
    """Indices of the images whose own AP rose most and fell most; of equal ones, those with more objects first."""
    change = facts.after.ap_of_image - facts.before.ap_of_image
    matching = facts.before.matching
    objects = np.bincount(matching.gt_image[matching.judged], minlength=len(change))
    order = np.lexsort((-objects, -change))
    gained = [int(index) for index in order if change[index] > 0]
    order = np.lexsort((-objects, change))
    lost = [int(index) for index in order if change[index] < 0]
    return gained[:MOST_IMAGES], lost[:MOST_IMAGES]


def best_score(side: Side) -> float:
    """The score from which on F1 at IoU 0.5 is best, over all categories; 0 where nothing is hit."""
    matching = side.matching
    counted = ~matching.ignored[0]
    order = np.argsort(-matching.score[counted], kind="stable")
    score, hit = matching.score[counted][order], matching.hit[0][counted][order]
    if not hit.any():
        return 0.0
    f1 = 2 * hit.cumsum() / (np.arange(1, len(hit) + 1) + matching.judged.sum())
    last = np.append(np.diff(score) != 0, True)  # of equal scores, all are drawn or none
    return float(score[np.argmax(np.where(last, f1, 0))])


def _photograph(folder: ImageFolder, image: Image) -> str:
    """A JPEG of at most 480 pixels a side, as ``data:`` URL."""
    pil = require("PIL.Image", extra="report", purpose="The galleries of the report")
    picture = pil.fromarray(folder.open(image).rgb)
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _objects(ground_truth: GroundTruth, side: Side, index: int) -> tuple[DrawnBox, ...]:
    rows = np.flatnonzero((side.matching.gt_image == index) & side.matching.judged)
    names = {category.id: shown(category.name) for category in ground_truth.categories}
    return tuple(
        _box(ground_truth.bbox[row].tolist(), True, f"truth: {names[int(ground_truth.category_id[row])]}")
        for row in rows
    )


def _detections(
    side: Side, results: Results, index: int, score: float, ground_truth: GroundTruth
) -> tuple[DrawnBox, ...]:
    """The boxes of one side in one image, false alarms first, so that hits lie above them."""
    matching = side.matching
    drawn = matching.hit[0] | ((matching.score >= score) & ~matching.ignored[0])
    here: IntArray = np.flatnonzero((matching.image == index) & drawn)
    here = here[np.argsort(-matching.score[here], kind="stable")][:_MOST_BOXES]
    names = {category.id: shown(category.name) for category in ground_truth.categories}
    boxes = []
    for position in here[np.argsort(matching.hit[0][here], kind="stable")].tolist():
        row, hit = int(matching.row[position]), bool(matching.hit[0, position])
        name = names[int(results.category_id[row])]
        title = f"{name}, score {results.score[row]:.2f}, {'hits an object' if hit else 'hits no object'}"
        boxes.append(_box(results.bbox[row].tolist(), hit, title))
    return tuple(boxes)


def _box(bbox: list[float], hit: bool, title: str) -> DrawnBox:
    x, y, width, height = (round(value, 1) for value in bbox)
    return DrawnBox(x, y, width, height, hit, title)
