"""Question 7: how far perfection would reach: what is lost in ranking, in scores, in places, in small objects.

The true IoU stands where the predicted one would, or the way to the object where the regression would. No seed: only
the plain row needs a head, and none of the others does.
"""

from __future__ import annotations

import torch

from iou_refiner.boxes import decode_boxes, encode_boxes
from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.stage.nms import iou_guided_nms
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.samples import Objects, best_object, true_iou
from scripts.ablations.harness import BOTH, RANKED, Lab, answer

_MEANS_OBJECT = 0.3  # true IoU above which a box means the object, and would be moved to it


def oracle(lab: Lab, *, ranked: float = 0.0, scored: float = 0.0, moved: float = 0.0) -> Suppression:
    """A stage that knows the truth.

    Args:
        lab: where the truth is.
        ranked, scored: exponent of the true IoU beside the class score, as ``rank_alpha`` and ``score_alpha``.
        moved: share of the way to its object that every candidate is moved first.
    """
    truth: dict[int, Objects] = {id(extraction.features): objects for extraction, objects in lab.seen}

    def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (found,), objects = candidates, truth[id(features)]
        iou = true_iou(found.boxes, found.labels, objects).nan_to_num(0)
        way = encode_boxes(best_object(found.boxes, found.labels, objects), found.boxes) * moved
        boxes = torch.where((iou > _MEANS_OBJECT)[:, None], decode_boxes(way, found.boxes), found.boxes)
        iou = true_iou(boxes, found.labels, objects).nan_to_num(0)
        rank = found.scores ** (1 - ranked) * iou**ranked
        keep, scores = iou_guided_nms(boxes, found.scores, rank, found.labels, threshold=0.5)
        scores = scores ** (1 - scored) * iou[keep] ** scored
        return [Detections(boxes[keep], scores, found.labels[keep], ious=iou[keep])]

    return stage


def questions(lab: Lab, head: IoUPredictor) -> dict[str, Suppression]:
    """A stage for every variant."""
    return {
        "the detector": oracle(lab),
        "the head, ranked and scored": Stage(head, **RANKED),
        "the head, boxes moved too": Stage(head, **BOTH),
        "true IoU ranks": oracle(lab, ranked=1),
        "true IoU ranks and scores, alpha .3": oracle(lab, ranked=1, scored=0.3),
        "true IoU ranks and scores, alpha .5": oracle(lab, ranked=1, scored=0.5),
        "true IoU ranks and is the score": oracle(lab, ranked=1, scored=1),
        "a quarter of the way": oracle(lab, moved=0.25),
        "half of the way": oracle(lab, moved=0.5),
        "all the way": oracle(lab, moved=1),
    }


if __name__ == "__main__":
    answer("ceilings", questions, __doc__)
