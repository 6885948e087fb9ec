"""What ``python -m scripts.results.gain`` measures with one head: results, seconds, boxes made worse."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iou_refiner.boxes import clip_boxes
from iou_refiner.coco import GroundTruth, Results, read_ground_truth
from iou_refiner.coco.data import FloatArray
from iou_refiner.detector.adapter import Suppression
from iou_refiner.detector.features import extract_image
from iou_refiner.detector.registry import detector_from_spec
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.checkpoint import load_head
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.samples import TrainingSet
from scripts.results.isotonic import rising_map


class Evaluator:
    """One detector, one head, one split of a data set, with features from the cache.

    Args:
        spec: the detector, as ``--detector`` names it.
        head: file of the head.
        cache: folder of the feature cache; what is missing is extracted.
        data: folder of ``images`` and their annotations, ``instances_SPLIT.json``.
        split: what is measured on.
    """

    def __init__(self, spec: str, head: Path, cache: Path, data: Path, split: str):
        self.adapter = detector_from_spec(spec)
        self.data = data
        self.cache = FeatureCache(cache, self.adapter).of(data / "images")
        self.truth = self.read(split)
        self.source = self.cache.load
        self.candidates = Results.concat(dump_candidates(self.source, self.adapter.category_ids, self.truth))
        self.head = load_head(head)

    def read(self, split: str) -> GroundTruth:
        """The annotation of a split, all images of which are in the cache from now on."""
        truth: GroundTruth = read_ground_truth(self.data / f"instances_{split}.json")
        for _ in self.cache.fill(truth.images):
            pass
        return truth

    def run(self, stage: Suppression) -> tuple[Results, float]:
        """The results of a stage, and its median seconds an image: those of the processor, as rows come one after the
        other and a machine is seldom idle for all of them."""
        seconds: list[float] = []

        def timed(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            began = time.process_time()
            detections = stage(features, candidates)
            seconds.append(time.process_time() - began)
            return detections

        parts = rescore(self.source, self.adapter.category_ids, timed, self.candidates, self.truth)
        return Results.concat(parts), float(np.median(seconds))

    def regressor(self, detector: StageSettings, steps: int) -> Suppression:
        """A regressor in the manner of RefineBox: what the detector does by itself, then so many steps of regression,
        whether the boxes gain by them or not."""
        suppress = Stage(self.head, detector)

        def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            (image,) = suppress(features, candidates)
            with torch.no_grad():
                table = self.head.encode(features)
            for _ in range(steps):
                boxes = self.head.regress(table, image.boxes, torch.zeros_like(image.labels), image.labels)
                image = image.replace(boxes=clip_boxes(boxes, features.image_sizes[0]))
            return [image]

        return stage

    def calibration(self) -> Callable[[FloatArray], FloatArray]:
        """The rising map from class score to true IoU that fits the candidates of val best."""
        data = TrainingSet(self.cache, self.read("val"))
        scores, ious = [], []
        for extraction, targets in map(data.load, range(len(data))):
            candidates = extraction.candidates
            scores.append(candidates.scores)
            ious.append(targets.true_iou(candidates.boxes, candidates.labels))
        return rising_map(torch.cat(scores).double().numpy(), torch.cat(ious).double().numpy())

    def seconds(self, settings: StageSettings, images: int = 40) -> tuple[float, float]:
        """Median seconds an image of the detector and of the stage, interleaved."""
        stage, detector, added = Stage(self.head, settings), [], []
        for image in self.truth.images[:images]:
            began = time.perf_counter()
            extraction = extract_image(self.adapter, self.data / "images", image)
            middle = time.perf_counter()
            stage(extraction.features, [extraction.candidates])
            detector.append(middle - began)
            added.append(time.perf_counter() - middle)
        return float(np.median(detector)), float(np.median(added))

    def made_worse(self, settings: StageSettings) -> dict[str, float]:
        """Of the detections that fit an object (true IoU > 0.5) before they are refined: how many there are, how many
        were moved, and the share of these, and of all, that fits it less."""
        data = TrainingSet(self.cache, self.truth)
        unrefined = Stage(self.head, settings.replace(regression_steps=0, ascent_steps=0))
        refined = Stage(self.head, settings)
        parts = []
        for extraction, targets in map(data.load, range(len(data))):
            candidates = extraction.candidates.replace(source=torch.arange(len(extraction.candidates)))
            pair = _joined(*(stage(extraction.features, [candidates])[0] for stage in (unrefined, refined)))
            fits = [targets.true_iou(detections.boxes, detections.labels) for detections in pair]
            parts.append(torch.stack([*fits, (pair[0].boxes != pair[1].boxes).any(1)]))
        return _shares(*torch.cat(parts, 1))


def _joined(before: Detections, after: Detections) -> tuple[Detections, Detections]:
    """The detections of two stages that come from the same candidates, in the same order."""
    before = before[torch.isin(before.source, after.source)]
    after = after[torch.isin(after.source, before.source)]  # boxes that met on one object are one by now
    return before[before.source.argsort()], after[after.source.argsort()]


def _shares(before: Tensor, after: Tensor, moved: Tensor) -> dict[str, float]:
    """What :meth:`Evaluator.made_worse` returns, from true IoU before and after (N,) and whether boxes moved (N,)."""
    judged = torch.isfinite(before) & torch.isfinite(after) & (before > 0.5)
    change, moved = (after - before)[judged], moved[judged] > 0
    of_moved = change[moved]
    return {
        "boxes": len(change), "moved": len(of_moved), "worse": (of_moved < 0).float().mean().item(),
        "worse by over .02": (of_moved < -0.02).float().mean().item(), "mean change": of_moved.mean().item(),
        "worse of all": (change < 0).double().mean().item(),
    }  # fmt: skip
