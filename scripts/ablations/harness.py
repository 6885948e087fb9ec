"""The laboratory: train heads that differ in one thing on cached features, measure them on val, keep every row.

Each recipe beside this file asks one question and lists variants; run as a command

    python scripts/experiments/boxes.py --detector faster_rcnn --cache cache/faster_rcnn

it trains every variant with every seed, measures it on the val split of coco-person, and appends one row per run to
``docs/results/experiments.jsonl``: question, variant, seed, settings, figures, seconds and commit. A run that has its
row is not repeated. ``python scripts/experiments/tables.py`` makes the tables of docs/accuracy.md from that file.

All heads of a question see the same number of images, far fewer than the head that ships: an experiment costs one
minute on one core, and its figures are for comparing within a question, not for quoting.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.small_detectors import SHARED
from iou_refiner.boxes import clip_boxes
from iou_refiner.coco import Image, Results, read_ground_truth
from iou_refiner.detector.adapter import Adapter, Suppression
from iou_refiner.detector.registry import detector_from_spec
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.rescoring import category_map, to_results
from iou_refiner.stage.ascent import refine_boxes
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.loop import agreement, fit, judgements
from iou_refiner.training.samples import TrainingSet, true_iou
from scripts.results.tables import ROOT, ROWS, rows

DATA = SHARED / "data" / "coco-person"
_LR = 5e-4  # of all recipes, whatever the default becomes
AP = ("AP", "AP50", "AP75", "AP90", "APs", "APm", "APl")

# What every head is measured in: suppressed and scored as the default does, nothing moved; then with boxes moved.
RANKED: dict[str, Any] = {
    "nms": "soft", "nms_threshold": 0.8, "rank_alpha": 0.5, "score_alpha": 0.3, "moves": 0, "steps": 0,
}  # fmt: skip
# What the detector does by itself.
OWN = RANKED | {"nms": "greedy", "nms_threshold": 0.5, "score_alpha": 0.0}
CLIMBED = RANKED | {"steps": 5, "step_size": 0.05}
BOTH = CLIMBED | {"moves": 1}


class ByIoU(IoUPredictor):
    """A head that learns the order beside the IoU, and then ranks and climbs by the IoU all the same."""

    def worth(self, *args: Any) -> Tensor:
        return self.iou(self(*args))

    def judge(self, *args: Any) -> tuple[Tensor, Tensor]:
        ious, _ = super().judge(*args)
        return ious, ious

    @classmethod
    def of(cls, head: IoUPredictor) -> ByIoU:
        """The same head, seen so."""
        copied = cls(**head._settings())
        copied.load_state_dict(head.state_dict())
        return copied.eval()


@dataclass(frozen=True)
class Variant:
    """One way to make a head.

    Args:
        head: settings of :class:`IoUPredictor`.
        fit: settings of :func:`fit`.
        views: views of every image that the passes are drawn from, by number.
        share: share of the training images used.
        make: the class of the head.
        prepare: given the head, more settings of :func:`fit`, for those that need it.
    """

    head: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[int, ...] = (0, 1, 2, 3)
    share: float = 1.0
    make: Callable[..., IoUPredictor] = IoUPredictor
    prepare: Callable[[IoUPredictor], Mapping[str, Any]] = lambda head: {}


def detector_of(name: str) -> Adapter:
    """One of the example detectors, perhaps with other weights, ``NAME:FILE``."""
    return detector_from_spec(f"{ROOT / 'examples' / 'small_detectors.py'}:{name}")


class Lab:
    """A frozen detector with its cached features of the train split, and of another that heads are measured on."""

    def __init__(self, adapter: Adapter, cache: Path, split: str = "val"):
        self.adapter = adapter
        self.cache = FeatureCache(cache, adapter)
        self.train, self.truth = (read_ground_truth(DATA / f"instances_{name}.json") for name in ("train", split))
        self.fill(self.truth.images, 0)
        self.asked = TrainingSet(self.cache, self.truth)
        self.seen = [self.asked.load(index) for index in range(len(self.asked))]

    def fill(self, images: Iterable[Image], view: int) -> None:
        """Extract what the cache lacks."""
        for _ in self.cache.fill(DATA / "images", images, view=view):
            pass

    def train_head(self, variant: Variant, seed: int, passes: int) -> IoUPredictor:
        """A head that has seen ``passes`` images, drawn evenly from the views."""
        images = self.train.images[:: round(1 / variant.share)]
        for view in variant.views:
            self.fill(images, view)
        data = TrainingSet(self.cache, self.train, views=0)  # its items are those chosen here
        items = [(image, view) for view in variant.views for image in images]
        random.Random(seed).shuffle(items)
        epochs = max(1, -(-passes // len(items)))  # few images are seen more than once
        data.items = items[: passes // epochs]
        seen = data.load(0)[0].features
        torch.manual_seed(seed)
        head = variant.make(seen.channels, seen.strides, detector=self.adapter.fingerprint(), **variant.head)
        fit(head, data, epochs=epochs, seed=seed, **{"lr": _LR, **variant.fit, **variant.prepare(head)})
        return head.eval()

    def results(self, stage: Suppression) -> Results:
        """What a stage makes of the candidates."""
        shared = category_map(self.adapter.category_ids, self.truth)
        parts = (
            to_results(image, extraction, stage(extraction.features, [extraction.candidates])[0], shared)
            for image, (extraction, _) in zip(self.truth.images, self.seen, strict=True)
        )
        return Results.concat(parts)

    def ap(self, stage: Suppression) -> dict[str, float]:
        """Its AP in points."""
        metrics = evaluate(self.results(stage), self.truth).metrics
        return {name: 100 * metrics[name] for name in AP}

    def figures(self, head: IoUPredictor) -> dict[str, Any]:
        """What every head is measured in."""
        began = time.process_time()
        ious, worths, scores, truth = judgements(head, self.asked)
        spent = time.process_time() - began
        ranking = agreement(ious, scores, truth)
        figures = {name: ranking[name] for name in ("pearson", "pearson_score", "mae", "pearson_all")}
        figures["pearson_worth"] = agreement(worths, scores, truth)["pearson"]
        figures["ms_per_1000_boxes"] = 1e6 * spent / sum(len(extraction.candidates) for extraction, _ in self.seen)
        figures["ascent"] = self.moved(partial(climb, head))
        if head.regress:
            figures["regression"] = self.moved(partial(regress, head))
        return figures | {name: self.ap(Stage(head, **way)) for name, way in (("ranked", RANKED), ("moved", BOTH))}

    def moved(self, move: Callable[[FeatureMaps, Detections], Tensor]) -> dict[str, float]:
        """What moving does to the candidates above IoU .5: mean gain of true IoU, share made worse."""
        changes = []
        for extraction, objects in self.seen:
            found = extraction.candidates
            before = true_iou(found.boxes, found.labels, objects)
            asked = torch.nonzero(before > 0.5).flatten()
            found, before = found[asked], before[asked]
            after = true_iou(move(extraction.features, found), found.labels, objects)
            changes.append((after - before)[torch.isfinite(after)])
        change = torch.cat(changes)
        return {"gain": change.mean().item(), "worse": (change < 0).float().mean().item()}


def regress(head: IoUPredictor, features: FeatureMaps, found: Detections) -> Tensor:
    """Boxes (N, 4) of an image after one step of regression."""
    with torch.no_grad():
        moved = head.move(head.encode(features), found.boxes, torch.zeros_like(found.labels))
    return clip_boxes(moved, features.image_sizes[0])


def climb(head: IoUPredictor, features: FeatureMaps, found: Detections, by: Any = None) -> Tensor:
    """Boxes (N, 4) of an image after the ascent; ``by`` is the function of it, default five steps of .05."""
    with torch.no_grad():
        pyramid = head.encode(features)
    level = head.finest_level(found.boxes)

    def score(boxes: Tensor, rows: Tensor) -> Tensor:
        return head.worth(pyramid, boxes, torch.zeros_like(rows), found.labels[rows], level[rows])

    moved = (by or partial(refine_boxes, step_size=0.05))(score, found.boxes).boxes
    return clip_boxes(moved, features.image_sizes[0])


def done(question: str, detector: str) -> set[tuple[str, int]]:
    """(variant, seed) of the rows of a question."""
    return {(r["variant"], r["seed"]) for r in rows() if (r["question"], r["detector"]) == (question, detector)}


def keep(question: str, detector: str, variant: str, seed: int, began: float, settings: Any, figures: Any) -> None:
    """Append a row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = {
        "question": question, "detector": detector, "variant": variant, "seed": seed, "settings": settings,
        "seconds": round(time.time() - began, 1), "commit": commit.stdout.strip(), **figures,
    }  # fmt: skip
    append(row)


def append(row: Mapping[str, Any]) -> None:
    """Keep a row for good."""
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def options(description: str | None) -> argparse.Namespace:
    """The command line of every recipe."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="faster_rcnn", choices=["faster_rcnn", "yolox"])
    parser.add_argument("--cache", type=Path, required=True, help="feature cache; what is missing is extracted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1200, help="images every head sees in training")
    parser.add_argument("--head", type=Path, help="ask this head instead of one for each seed; questions 5 to 7")
    parser.add_argument("--only", nargs="*", help="variants to run; default: all")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def known_default(detector: str, seed: int, passes: int) -> dict[str, Any] | None:
    """The row of the default head, if another question has measured it."""
    for row in rows():
        same = (row["detector"], row["seed"], row["settings"].get("passes")) == (detector, seed, passes)
        if same and row["variant"].startswith("default: "):
            return row
    return None


def ask(question: str, variants: Mapping[str, Variant], description: str | None) -> None:
    """Train and measure all variants of a question, seed by seed."""
    chosen = options(description)
    lab = Lab(detector_of(chosen.detector), chosen.cache)
    for seed in range(chosen.seeds):
        for name, variant in variants.items():
            if (name, seed) in done(question, chosen.detector) or (chosen.only and name not in chosen.only):
                continue
            twin = known_default(chosen.detector, seed, chosen.passes) if variant == Variant() else None
            if twin:
                append(twin | {"question": question, "variant": name})
                continue
            began = time.time()
            head = lab.train_head(variant, seed, chosen.passes)
            settings = {"head": variant.head, "fit": variant.fit, "views": variant.views, "share": variant.share}
            keep(question, chosen.detector, name, seed, began, settings | {"passes": chosen.passes}, lab.figures(head))
    print(f"{question}: done", file=sys.stderr)


def answer(
    question: str, stages: Callable[[Lab, IoUPredictor], Mapping[str, Suppression]], description: str | None
) -> None:
    """Measure all stages of a question with the default head of every seed, which is trained once and kept."""
    chosen = options(description)
    lab = Lab(detector_of(chosen.detector), chosen.cache)
    for seed in range(1 if chosen.head else chosen.seeds):
        path = chosen.head or chosen.cache / f"lab-head-{chosen.passes}-{seed}.safetensors"
        if not path.exists():
            lab.train_head(Variant(), seed, chosen.passes).save(path)
        head = IoUPredictor.load(path)
        for name, stage in stages(lab, head).items():
            if (name, seed) in done(question, chosen.detector) or (chosen.only and name not in chosen.only):
                continue
            began = time.time()
            ap = lab.ap(stage)
            settings = asdict(stage.settings) if isinstance(stage, Stage) else {}
            settings |= {"head": chosen.head.parent.name} if chosen.head else {"passes": chosen.passes}
            keep(question, chosen.detector, name, seed, began, settings, {"stage": ap})
