"""What scripts/gain.py measures: the settings of each row, and the results they give."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from iou_refiner.boxes import clip_boxes
from iou_refiner.coco import GroundTruth, Results, read_ground_truth
from iou_refiner.coco.data import FloatArray
from iou_refiner.detector.adapter import Suppression
from iou_refiner.detector.features import extract_image
from iou_refiner.detector.registry import detector_from_spec
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.samples import TrainingSet, true_iou


def variants(own: float, alpha: float, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the stage for each row."""
    # Named in full: what is left out would be what the head recommends.
    keep = {"nms": "greedy", "nms_threshold": own, "moves": 0, "steps": 0, "margin": 0.0, "score_alpha": 0.0}
    guided = {"nms": "iou", "nms_threshold": settings["nms_threshold"], "rank_alpha": settings["rank_alpha"]}
    ascent = {"steps": settings["steps"], "step_size": settings["step_size"], "margin": settings["margin"]}
    both = keep | {"score_alpha": alpha} | guided
    return {
        "detector": keep,
        "Soft-NMS": keep | {"nms": "soft", "nms_threshold": 1.0, "rank_alpha": 0.0},
        "rescoring": keep | {"score_alpha": alpha},
        "IoU-guided NMS": keep | guided,
        "ascent": keep | ascent,
        "regression": keep | {"moves": 1},
        "rescoring + IoU-guided NMS": both,
        "the same + ascent": both | ascent,
        "the same + regression": both | {"moves": 1},
        "the same + regression, softly": both | {"moves": 1, "nms": "soft", "nms_threshold": 0.8},
    }


def rising_map(score: FloatArray, iou: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """The rising map from a score to the true IoU (NaN where unknown) that fits best, by isotonic regression."""
    known = np.isfinite(iou)
    order = np.argsort(score[known])
    score, iou = score[known][order], iou[known][order]
    fit = isotonic_regression(iou)
    # Steps would make ties, and lose the order within them; lines between their centres make none.
    steps = fit.blocks[:-1]
    centers = np.add.reduceat(score, steps) / np.diff(fit.blocks)
    x, y = np.r_[0.0, centers, 1.0], np.r_[0.0, fit.x[steps], 1.0]
    return lambda scores: np.interp(scores, x, y)


class Bench:
    """One detector, one head, one split of a data set, features from the cache."""

    def __init__(self, spec: str, head: Path, cache: Path, data: Path, split: str):
        self.adapter = detector_from_spec(spec)
        self.data = data
        self.cache = FeatureCache(cache, self.adapter)
        self.truth = self.read(split)
        self.look = lambda image: self.cache.load(image.id)
        self.candidates = Results.concat(dump_candidates(self.look, self.adapter.category_ids, self.truth))
        self.head = IoUPredictor.load(head)

    def read(self, split: str) -> GroundTruth:
        """The annotation of a split, all images of which are in the cache from now on."""
        truth: GroundTruth = read_ground_truth(self.data / f"instances_{split}.json")
        for _ in self.cache.fill(self.data / "images", truth.images):
            pass
        return truth

    def through(self, stage: Suppression) -> tuple[Results, float]:
        """What a stage makes of the candidates, and its median seconds an image: of the processor, as rows come one
        after the other and a machine is seldom idle for all of them."""
        seconds: list[float] = []

        def timed(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            began = time.process_time()
            found = stage(features, candidates)
            seconds.append(time.process_time() - began)
            return found

        parts = rescore(self.look, self.adapter.category_ids, timed, self.candidates, self.truth)
        return Results.concat(parts), float(np.median(seconds))

    def regressor(self, own: float, steps: int) -> Suppression:
        """A regressor in the manner of RefineBox: greedy NMS by class score, then so many steps, taken unasked."""
        unmoved = Stage(self.head, nms="greedy", nms_threshold=own, moves=0, steps=0, score_alpha=0.0)

        def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            (kept,) = unmoved(features, candidates)
            pyramid, size = self.head.encode(features), features.image_sizes[0]
            for _ in range(steps):
                moved = self.head.move(pyramid, kept.boxes, torch.zeros_like(kept.labels))
                kept = kept.replace(boxes=clip_boxes(moved, size))
            return [kept]

        return stage

    def calibration(self) -> Callable[[FloatArray], FloatArray]:
        """The rising map from class score to true IoU that fits the candidates of val best."""
        data = TrainingSet(self.cache, self.read("val"))
        found = [(seen.candidates, objects) for seen, objects in map(data.load, range(len(data)))]
        score = torch.cat([d.scores for d, _ in found]).double().numpy()
        iou = torch.cat([true_iou(d.boxes, d.labels, objects) for d, objects in found]).double().numpy()
        return rising_map(score, iou)

    def seconds(self, settings: dict[str, Any], images: int = 40) -> tuple[float, float]:
        """Median seconds an image of the detector and of the stage, interleaved."""
        stage, detector, added = Stage(self.head, **settings), [], []
        for image in self.truth.images[:images]:
            began = time.perf_counter()
            extraction = extract_image(self.adapter, self.data / "images", image)
            middle = time.perf_counter()
            stage(extraction.features, [extraction.candidates])
            detector.append(middle - began)
            added.append(time.perf_counter() - middle)
        return float(np.median(detector)), float(np.median(added))

    def made_worse(self, settings: dict[str, Any]) -> dict[str, float]:
        """Of the detections that fit an object (true IoU > 0.5) before any move: how many there are, how many were
        moved, and the share of these, and of all, that fits it less."""
        data = TrainingSet(self.cache, self.truth)
        parts = []
        still, moving = Stage(self.head, **settings | {"moves": 0, "steps": 0}), Stage(self.head, **settings)
        for index in range(len(data)):
            extraction, objects = data.load(index)
            given = extraction.candidates
            given = given.replace(source=torch.arange(len(given)))
            before, after = (stage(extraction.features, [given])[0] for stage in (still, moving))
            before = before[torch.isin(before.source, after.source)]
            after = after[torch.isin(after.source, before.source)]  # boxes that met on one object are one by now
            before, after = before[before.source.argsort()], after[after.source.argsort()]
            fit, refit = (true_iou(d.boxes, d.labels, objects) for d in (before, after))
            parts.append(torch.stack([fit, refit, (before.boxes != after.boxes).any(1)]))
        fit, refit, moved = torch.cat(parts, 1)
        judged = torch.isfinite(fit) & torch.isfinite(refit) & (fit > 0.5)
        change, moved = (refit - fit)[judged], moved[judged] > 0
        of_moved = change[moved]
        return {
            "boxes": len(change), "moved": len(of_moved), "worse": (of_moved < 0).float().mean().item(),
            "worse by over .02": (of_moved < -0.02).float().mean().item(), "mean change": of_moved.mean().item(),
            "worse of all": (change < 0).double().mean().item(),
        }  # fmt: skip
