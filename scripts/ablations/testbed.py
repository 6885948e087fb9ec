"""The test bed: a frozen detector with cached features, on which heads are trained and stages measured."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.small_detectors import SHARED
from iou_refiner.coco import Image, Results, read_ground_truth
from iou_refiner.detector.adapter import Adapter, Suppression
from iou_refiner.detector.registry import detector_from_spec
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.head.config import HeadMetadata
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.rescoring import category_map, to_results
from iou_refiner.stage.stage import Stage
from iou_refiner.training.loop import predict_candidates, summarize, train_head
from iou_refiner.training.samples import TrainingSet
from scripts.ablations.refinement import Refine, ascend, regress
from scripts.ablations.settings import BOTH, RANKED
from scripts.ablations.variant import Variant
from scripts.paths import ROOT

COCO_PERSON = SHARED / "data" / "coco-person"
AP = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")


def small_detector(name: str) -> Adapter:
    """One of the example detectors, perhaps with other weights: ``NAME`` or ``NAME:FILE``."""
    return detector_from_spec(f"{ROOT / 'examples' / 'small_detectors.py'}:{name}")


class Testbed:
    """A frozen detector, the cached features of the images to train on, and those of the images to measure on.

    Args:
        adapter: the detector.
        cache: folder of its feature cache; what is missing is extracted.
        data: folder of ``images`` and their annotations, ``instances_SPLIT.json``.
        split: what heads and stages are measured on.

    Attributes:
        train_truth, truth: the annotations of the two.
        eval_set: what is measured on.
        eval_items: all its extractions and targets, in memory.
    """

    def __init__(self, adapter: Adapter, cache: Path, data: Path = COCO_PERSON, split: str = "val"):
        self.adapter, self.images = adapter, data / "images"
        self.cache = FeatureCache(cache, adapter).of(self.images)
        self.train_truth, self.truth = (read_ground_truth(data / f"instances_{name}.json") for name in ("train", split))
        self.fill(self.truth.images, 0)
        self.eval_set = TrainingSet(self.cache, self.truth)
        self.eval_items = [self.eval_set.load(index) for index in range(len(self.eval_set))]

    def fill(self, images: Iterable[Image], view: int) -> None:
        """Extract what the cache lacks."""
        for _ in self.cache.fill(images, view=view):
            pass

    def train_head(self, variant: Variant, seed: int, passes: int) -> IoUHead:
        """A head that has seen ``passes`` images, drawn evenly from the variant's views."""
        images = self.train_truth.images[:: round(1 / variant.share)]
        for view in variant.views:
            self.fill(images, view)
        items = [(image, view) for view in variant.views for image in images]
        random.Random(seed).shuffle(items)
        epochs = max(1, -(-passes // len(items)))  # few images are seen more than once
        data = TrainingSet(self.cache, self.train_truth, views=0)
        data.items = items[: passes // epochs]
        features = data.load(0)[0].features
        torch.manual_seed(seed)
        metadata = HeadMetadata(detector_name=self.adapter.name, fingerprint=self.adapter.fingerprint())
        head = variant.make_head(features.channels, features.strides, variant.config, metadata=metadata)
        settings = variant.train_settings(epochs=epochs)
        train_head(head, data, settings, seed=seed, sample=variant.make_sampler(head), loss=variant.loss)
        return head.eval()

    def results(self, stage: Suppression) -> Results:
        """The detections that a stage makes of the candidates."""
        category_of = category_map(self.adapter.category_ids, self.truth)
        parts = (
            to_results(image, extraction, stage(extraction.features, [extraction.candidates])[0], category_of)
            for image, (extraction, _) in zip(self.truth.images, self.eval_items, strict=True)
        )
        return Results.concat(parts)

    def measure_stage(self, stage: Suppression) -> dict[str, float]:
        """The AP of a stage, in points."""
        metrics = evaluate(self.results(stage), self.truth).metrics
        return {name: 100 * metrics[name] for name in AP}

    def measure_head(self, head: IoUHead, **stage: Any) -> dict[str, Any]:
        """What the head of every variant is measured in; ``stage`` are changes to the settings of its stage."""
        ranked, both = RANKED.replace(**stage), BOTH.replace(**stage)
        began = time.process_time()
        iou, ranking, scores, true_iou = predict_candidates(head, self.eval_set)
        seconds = time.process_time() - began
        if ranked.rank_by == "iou":
            ranking = iou
        agreement = summarize(iou, scores, true_iou)
        figures: dict[str, Any] = {n: agreement[n] for n in ("pearson", "pearson_score", "mae", "pearson_all")}
        figures["pearson_ranking"] = summarize(ranking, scores, true_iou)["pearson"]
        figures["ms_per_1000_boxes"] = 1e6 * seconds / len(iou)
        figures["ascent"] = self.measure_refinement(partial(ascend, head, rank_by=ranked.rank_by))
        if head.config.deltas:
            figures["regression"] = self.measure_refinement(partial(regress, head))
        return figures | {
            name: self.measure_stage(Stage(head, settings)) for name, settings in (("ranked", ranked), ("moved", both))
        }

    def measure_refinement(self, refine: Refine) -> dict[str, float]:
        """What refining does to the candidates above IoU .5: mean change of true IoU, and the share made worse."""
        changes = []
        for extraction, targets in self.eval_items:
            candidates = extraction.candidates
            before = targets.true_iou(candidates.boxes, candidates.labels)
            rows = torch.nonzero(before > 0.5).flatten()
            candidates, before = candidates[rows], before[rows]
            after = targets.true_iou(refine(extraction.features, candidates), candidates.labels)
            changes.append((after - before)[torch.isfinite(after)])
        change = torch.cat(changes)
        return {"gain": change.mean().item(), "worse": (change < 0).float().mean().item()}
