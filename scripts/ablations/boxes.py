"""Ablation 1: which boxes of which images to train on.

Boxes: jittered objects as in the paper, the detector's own candidates, both, or boxes that the head itself has refined
(on policy). Images: the image alone, its mirror image, windows of it; and how many images.
"""

from __future__ import annotations

from typing import Any

import torch

from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.detector.features import Extraction
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.training.loop import SampleBoxes
from iou_refiner.training.samples import Samples, Targets, sample_boxes
from scripts.ablations.harness import run_training_ablation
from scripts.ablations.variant import Variant

_ON_POLICY = 0.25  # share of the samples that the head regresses before it learns from them


def on_policy(head: IoUHead) -> SampleBoxes:
    """Some samples are what the head, as it stands, makes of the boxes: it learns from its own mistakes."""

    def sample(extraction: Extraction, targets: Targets, count: int, **settings: Any) -> Samples:
        samples = sample_boxes(extraction, targets, count, **settings)
        refined = torch.rand(len(samples), generator=settings["generator"]) < _ON_POLICY
        with torch.no_grad():
            table = head.encode(extraction.features)
        boxes = head.regress(table, samples.boxes, torch.zeros_like(samples.labels), samples.labels)
        boxes = torch.where(refined[:, None], clip_boxes(boxes, extraction.features.image_sizes[0]), samples.boxes)
        iou, gt_boxes = targets.match(boxes, samples.labels)
        rows = torch.nonzero(torch.isfinite(iou) & valid_boxes(boxes)).flatten()
        return Samples(boxes, samples.labels, iou, gt_boxes)[rows]

    return sample


VARIANTS = {
    "default: half jittered, half candidates": Variant(),
    "jittered only, IoU > .5, as the paper": Variant(train={"candidate_share": 0.0, "jitter_min_iou": 0.5}),
    "jittered only": Variant(train={"candidate_share": 0.0}),
    "candidates only": Variant(train={"candidate_share": 1.0}),
    "default, a quarter on policy": Variant(make_sampler=on_policy),
    "the image alone": Variant(views=(0,)),
    "a quarter of the images": Variant(share=1 / 4),
}

if __name__ == "__main__":
    run_training_ablation("boxes", VARIANTS, __doc__)
