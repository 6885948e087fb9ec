"""The rows about ``rescore``: what everything but the detector and the head costs, over real photographs."""

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
from iou_refiner import Detections, FeatureMaps, IoUHead, Stage
from iou_refiner.coco import Image, Results, read_ground_truth, read_results, write_results
from iou_refiner.detector.features import Extraction, extract_image
from iou_refiner.detector.images import open_image
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.rescoring import dump_candidates, rescore
from scripts.bench.work import Work, ensure, lively

DATA = small_detectors.SHARED / "data" / "coco-person"


class Recorder:
    """A stage that remembers what it answers, image by image."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.settings = stage, stage.settings
        self.answers: list[list[Detections]] = []

    def __call__(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        self.answers.append(self.stage(features, candidates))
        return self.answers[-1]


class Replay:
    """A stage that answers again what a recorder remembers, in the same order."""

    def __init__(self, recorder: Recorder) -> None:
        self.settings, self.answers = recorder.settings, iter(recorder.answers)

    def __call__(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return next(self.answers)


class Photographs:
    """The first photographs of the test split, and three ways to come by what the detector extracts from them."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.adapter = small_detectors.faster_rcnn().to(device)
        truth = read_ground_truth(DATA / "instances_test.json")
        self.truth = replace(truth, images=truth.images[:count])
        self.extractions = {image.id: self.live(image) for image in self.truth.images}

    def live(self, image: Image) -> Extraction:
        return extract_image(self.adapter, DATA / "images", image)

    def decoded(self, image: Image) -> Extraction:
        """All but the detector's own work."""
        self.adapter.prepare(open_image(DATA / "images", image))
        return self.extractions[image.id]

    def at_hand(self, image: Image) -> Extraction:
        return self.extractions[image.id]


def rescoring(device: torch.device, count: int = 16) -> Iterator[Work]:
    """The whole run, against the same run where detector and head answer from memory."""
    if not (small_detectors.MODELS / "frcnn_lite0.py").is_file() or not DATA.is_dir():
        print(f"SKIPPED rescore: {small_detectors.MODELS} and {DATA} are not both there", file=sys.stderr)
        return
    photographs = Photographs(count, device)
    category_ids, truth = photographs.adapter.category_ids, photographs.truth
    maps = photographs.at_hand(truth.images[0]).features
    torch.manual_seed(0)
    stage = Stage(lively(IoUHead(maps.channels, maps.strides)).to(device))
    with tempfile.TemporaryDirectory() as folder:
        saved, rescored = Path(folder, "in.json"), Path(folder, "out.json")
        write_results(saved, Results.concat(dump_candidates(photographs.at_hand, category_ids, truth, top=100)))

        def run(source: FeatureSource, stage: Any) -> Results:
            results = Results.concat(rescore(source, category_ids, stage, read_results(saved), truth))
            write_results(rescored, results)
            return results

        recorder = Recorder(stage)
        whole = run(photographs.live, recorder)

        def check(source: FeatureSource) -> None:
            again = run(source, Replay(recorder))
            ensure(len(again) == len(whole) > 10 * count and bool((again.bbox == whole.bbox).all()))

        for how, source in (("decoded", photographs.decoded), ("at hand", photographs.at_hand)):
            yield Work(
                f"rescore but for detector and head, photographs {how}",
                f"the whole run, Faster R-CNN Lite0, {count} photographs", 0.02,
                lambda source=source: run(source, Replay(recorder)), partial(run, photographs.live, stage),
                partial(check, source),
            )  # fmt: skip
