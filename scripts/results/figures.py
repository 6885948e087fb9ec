"""The figures of docs/accuracy.md, after those of the paper.

    python -m scripts.results.figures faster_rcnn HEAD --cache CACHE

Score and predicted IoU against the true IoU (its Fig. 2), and what suppression leaves, by true IoU (Fig. 3), from a
head and the test split; AP against iterations (Fig. 4), from the rows of the ablation of the ascent; AP against the IoU
threshold, before and after, from the record of ``python -m scripts.results.gain``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from iou_refiner.coco import read_ground_truth
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.checkpoint import load_head
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training.samples import TrainingSet
from scripts.ablations.records import Records, value_of
from scripts.ablations.testbed import COCO_PERSON, small_detector
from scripts.paths import RESULTS, ROOT

FIGURES = ROOT / "docs" / "figures"
_BEFORE, _AFTER, _THIRD = "#8c8c8c", "#1f6feb", "#d9822b"
_DETECTOR = StageSettings.detector_only()
_SUPPRESSIONS = {
    "no NMS": _DETECTOR.replace(nms="none", max_detections=1000),
    "greedy NMS": _DETECTOR,
    "IoU-guided NMS": _DETECTOR.replace(nms="iou_guided", rank_alpha=1.0),
}


def correlation(candidates: np.ndarray, name: str) -> None:
    """Fig. 2: true IoU of candidates above .5 against class score, and against predicted IoU. (3, N): score, predicted,
    true."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    score, predicted, truth = candidates[:, candidates[2] > 0.5]
    for axis, values, label in zip(axes, (score, predicted), ("class score", "predicted IoU"), strict=True):
        axis.hexbin(values, truth, gridsize=40, bins="log", cmap="Blues", mincnt=1, linewidths=0, rasterized=True)
        axis.set(xlabel=label, title=f"Pearson {np.corrcoef(values, truth)[0, 1]:.2f}", xlim=(0, 1))
    axes[0].set_ylabel("true IoU")
    save(figure, f"{name}-correlation")


def survivors(by_rule: dict[str, np.ndarray], name: str) -> None:
    """Fig. 3: boxes that each rule of suppression leaves, by their true IoU."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    edges = np.arange(0.5, 1.001, 0.1)
    width = 0.026
    for index, ((rule, truth), color) in enumerate(zip(by_rule.items(), (_BEFORE, _THIRD, _AFTER), strict=True)):
        counts = np.histogram(truth, edges)[0]
        axis.bar(edges[:-1] + 0.022 + index * (width + 0.002), counts, width, label=rule, color=color)
    axis.set(xlabel="true IoU", ylabel="boxes", xticks=edges)
    axis.legend(frameon=False)
    save(figure, f"{name}-survivors")


def iterations(name: str) -> None:
    """Fig. 4: AP on val against iterations, of the ascent and of regression; seeds thin, their mean thick."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    rows = Records().by_variant("ascent", name)
    for form, color in (("ascent, {} step{} of .05", _AFTER), ("regression, {} step{}", _THIRD)):
        variants = {0: "no move"} | {n: form.format(n, "s" * (n > 1)) for n in (1, 2, 3, 5, 10, 20)}
        counts = [n for n, variant in variants.items() if variant in rows]
        values = np.array([[value_of(row, "stage.AP") for row in rows[variants[n]]] for n in counts], dtype=float)
        axis.plot(counts, values, color=color, alpha=0.25, linewidth=1)
        axis.plot(counts, values.mean(1), color=color, marker="o", label=form.partition(",")[0])
    axis.set(xlabel="iterations", ylabel="AP on val")
    axis.legend(frameon=False)
    save(figure, f"{name}-iterations")


def thresholds(name: str) -> None:
    """AP on test at each IoU threshold, before and after."""
    record = json.loads((RESULTS / f"coco-person-{name.replace('_', '-')}.json").read_text())
    figure, axis = plt.subplots(figsize=(6, 3.4))
    at = ("AP50", "AP60", "AP70", "AP75", "AP80", "AP90")
    x = [int(metric[2:]) / 100 for metric in at]
    chosen = record["rows"]["as chosen on val"]
    for label, side, color in (("detector", "before", _BEFORE), ("with iou-refiner", "after", _AFTER)):
        axis.plot(x, [100 * chosen[side]["metrics"][metric] for metric in at], marker="o", label=label, color=color)
    axis.set(xlabel="IoU threshold", ylabel="AP on test")
    axis.legend(frameon=False)
    save(figure, f"{name}-thresholds")


def save(figure: Any, name: str) -> None:
    """Write a figure as SVG, without a date, so that the same figures are the same bytes."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name.replace('_', '-')}.svg", metadata={"Date": None})
    plt.close(figure)


def suppressed(head: IoUHead, data: TrainingSet) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score, predicted and true IoU of all candidates (3, N), and the true IoU of what each suppression leaves."""
    stages = {rule: Stage(head, settings) for rule, settings in _SUPPRESSIONS.items()}
    columns, left = [], {rule: [] for rule in stages}
    for extraction, targets in map(data.load, range(len(data))):
        for rule, stage in stages.items():
            (detections,) = stage(extraction.features, [extraction.candidates])
            truth = targets.true_iou(detections.boxes, detections.labels)
            left[rule].append(truth)
            if rule == "no NMS":
                columns.append(torch.stack([detections.scores, detections.ious, truth]))
    candidates = torch.cat(columns, 1)
    return candidates[:, candidates.isfinite().all(0)].numpy(), {r: torch.cat(t).numpy() for r, t in left.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", choices=["faster_rcnn", "yolox"])
    parser.add_argument("head", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    options = parser.parse_args()
    plt.rcParams |= {"svg.hashsalt": "iou-refiner", "axes.spines.top": False, "axes.spines.right": False}
    cache = FeatureCache(options.cache, small_detector(options.detector)).of(COCO_PERSON / "images")
    test = TrainingSet(cache, read_ground_truth(COCO_PERSON / "instances_test.json"))
    candidates, left = suppressed(load_head(options.head), test)
    correlation(candidates, options.detector)
    survivors(left, options.detector)
    iterations(options.detector)
    thresholds(options.detector)


if __name__ == "__main__":
    main()
