"""Ablation 7: how far perfection would reach: what is lost in ranking, in scores, in places, in small objects.

The true IoU stands where the predicted IoU would, or the object where regression would lead. Only the two rows of "the
head" need one, and depend on the seed.
"""

from __future__ import annotations

import torch

from iou_refiner.boxes import decode_boxes, encode_boxes
from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.nms import iou_guided_nms
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.samples import Targets
from scripts.ablations.harness import run_stage_ablation
from scripts.ablations.settings import BOTH, RANKED
from scripts.ablations.testbed import Testbed

_POSITIVE_IOU = 0.3  # true IoU above which a box means the object, and would be moved to it


def oracle(bed: Testbed, *, rank_alpha: float = 0.0, score_alpha: float = 0.0, moved: float = 0.0) -> Suppression:
    """A stage that knows the truth.

    Args:
        bed: where the truth is.
        rank_alpha, score_alpha: exponent of the true IoU beside the class score, as in the stage.
        moved: share of the way to its object that every candidate is moved first.
    """
    truth: dict[int, Targets] = {id(extraction.features): targets for extraction, targets in bed.eval_items}

    def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (image,), targets = candidates, truth[id(features)]
        iou, gt_boxes = targets.match(image.boxes, image.labels)
        boxes = decode_boxes(encode_boxes(gt_boxes, image.boxes) * moved, image.boxes)
        boxes = torch.where((iou.nan_to_num(0) > _POSITIVE_IOU)[:, None], boxes, image.boxes)
        iou = targets.true_iou(boxes, image.labels).nan_to_num(0)
        rank = image.scores ** (1 - rank_alpha) * iou**rank_alpha
        keep, scores = iou_guided_nms(boxes, image.scores, rank, image.labels, threshold=0.5)
        scores = scores ** (1 - score_alpha) * iou[keep] ** score_alpha
        return [Detections(boxes[keep], scores, image.labels[keep], ious=iou[keep])]

    return stage


def stages(bed: Testbed, head: IoUHead) -> dict[str, Suppression]:
    """A stage for every variant."""
    return {
        "the detector": oracle(bed),
        "the head, ranked and scored": Stage(head, RANKED),
        "the head, boxes moved too": Stage(head, BOTH),
        "true IoU ranks": oracle(bed, rank_alpha=1),
        "true IoU ranks and scores, alpha .3": oracle(bed, rank_alpha=1, score_alpha=0.3),
        "true IoU ranks and scores, alpha .5": oracle(bed, rank_alpha=1, score_alpha=0.5),
        "true IoU ranks and is the score": oracle(bed, rank_alpha=1, score_alpha=1),
        "a quarter of the way": oracle(bed, moved=0.25),
        "half of the way": oracle(bed, moved=0.5),
        "all the way": oracle(bed, moved=1),
    }


if __name__ == "__main__":
    run_stage_ablation("ceilings", stages, __doc__)
