"""The row of bench.py about ``rescore``: what everything but the detector and the head costs, over real photographs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples import small_detectors
from iou_refiner import Detections, FeatureMaps, IoUPredictor, Stage
from iou_refiner.coco import Image, Results, read_ground_truth, read_results, write_results
from iou_refiner.detector.features import Extraction, extract_image, open_image
from iou_refiner.rescoring import dump_candidates, rescore
from scripts.bench.work import Work, ensure, lively

DATA = small_detectors.MODELS.parent / "data" / "coco-person"


class Recorded:
    """A stage that says again what a real one said, image by image."""

    def __init__(self, stage: Stage, said: list[list[Detections]]) -> None:
        self.moves_boxes, self.left = stage.moves_boxes, iter(said)

    def __call__(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return next(self.left)


def rescoring(device: torch.device, images: int = 16) -> Iterator[Work]:
    """The whole run on the first test images, against the same run where detector and head answer from memory."""
    if not (small_detectors.MODELS / "frcnn_lite0.py").is_file() or not DATA.is_dir():
        print(f"SKIPPED rescore: {small_detectors.MODELS} and {DATA} are not both there", file=sys.stderr)
        return
    adapter = small_detectors.faster_rcnn().to(device)
    truth = read_ground_truth(DATA / "instances_test.json")
    truth = replace(truth, images=truth.images[:images])
    look = partial(extract_image, adapter, DATA / "images")
    seen = {image.id: look(image) for image in truth.images}
    maps = seen[truth.images[0].id].features
    torch.manual_seed(0)
    stage = Stage(lively(IoUPredictor(maps.channels, maps.strides)).to(device))
    folder = Path(tempfile.mkdtemp())
    candidates = dump_candidates(lambda image: seen[image.id], adapter.category_ids, truth, top=100)
    write_results(folder / "in.json", Results.concat(candidates))

    def run(look: Any, stage: Any) -> Results:
        given = read_results(folder / "in.json")
        whole = Results.concat(rescore(look, adapter.category_ids, stage, given, truth))
        write_results(folder / "out.json", whole)
        return whole

    said: list[list[Detections]] = []
    whole = run(look, lambda features, found: said.append(stage(features, found)) or said[-1])

    def remember(image: Image) -> Extraction:
        adapter.prepare(open_image(DATA / "images", image))
        return seen[image.id]

    def same() -> None:
        again = run(remember, Recorded(stage, said))
        ensure(len(again) == len(whole) > 10 * images and bool((again.bbox == whole.bbox).all()))

    peer = f"the whole run, Faster R-CNN Lite0, {images} photographs"
    yield Work(
        "rescore but for detector and head, photographs decoded", peer, 0.02,
        lambda: run(remember, Recorded(stage, said)), lambda: run(look, stage), same,
    )  # fmt: skip
    yield Work(
        "rescore but for detector and head, photographs at hand", peer, 0.02,
        lambda: run(lambda image: seen[image.id], Recorded(stage, said)), lambda: run(look, stage), same,
    )  # fmt: skip
