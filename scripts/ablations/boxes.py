"""Question 1: which boxes of which images to train on.

Boxes: jittered objects as in the paper, the detector's own candidates, both, boxes met on the way uphill (on policy).
Images: the image alone, its mirror image, windows of it; and how many images.
"""

from __future__ import annotations

from typing import Any

import torch

from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.detector.features import Extraction
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.training.samples import Objects, Samples, best_object, sample_boxes, true_iou
from scripts.ablations.harness import Variant, ask

_ON_POLICY = 0.25  # share of the boxes that are moved by the head before it is asked


def on_policy(head: IoUPredictor) -> dict[str, Any]:
    """Some boxes are those that the head, as it stands, would move the drawn boxes to: its own mistakes."""

    def sample(extraction: Extraction, objects: Objects, count: int, **settings: Any) -> Samples:
        drawn = sample_boxes(extraction, objects, count, **settings)
        moved = torch.rand(len(drawn.iou), generator=settings["generator"]) < _ON_POLICY
        with torch.no_grad():
            new = head.move(head.encode(extraction.features), drawn.boxes, torch.zeros_like(drawn.labels))
        boxes = torch.where(moved[:, None], clip_boxes(new, extraction.features.image_sizes[0]), drawn.boxes)
        iou = true_iou(boxes, drawn.labels, objects)
        rows = torch.nonzero(torch.isfinite(iou) & valid_boxes(boxes)).flatten()
        return Samples(boxes, drawn.labels, iou, best_object(boxes, drawn.labels, objects))[rows]

    return {"sample": sample}


VARIANTS = {
    "default: half jittered, half candidates": Variant(),
    "jittered only, IoU > .5, as the paper": Variant(fit={"candidate_share": 0.0, "lowest_iou": 0.5}),
    "jittered only": Variant(fit={"candidate_share": 0.0}),
    "candidates only": Variant(fit={"candidate_share": 1.0}),
    "default, a quarter on policy": Variant(prepare=on_policy),
    "the image alone": Variant(views=(0,)),
    "a quarter of the images": Variant(share=1 / 4),
}

if __name__ == "__main__":
    ask("boxes", VARIANTS, __doc__)
