"""Question 5: how to move boxes. Ascent in several forms, regression, both, and when.

Asked of the same three heads, each trained with the defaults; nothing is trained here but these.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from iou_refiner.boxes import clip_boxes, decode_boxes
from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.stage.ascent import refine_boxes_paper
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from scripts.ablations.harness import BOTH, CLIMBED, RANKED, ByIoU, Lab, answer, climb

_STARTS = 4
_SPREAD = 0.05  # of the further starts, in relative coordinates

_REGRESSED = RANKED | {"moves": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "no move": RANKED,
    **{f"ascent, {steps} steps of .05": CLIMBED | {"steps": steps} for steps in (1, 2, 5, 10, 20)},
    **{f"ascent, 5 steps of {size}": CLIMBED | {"step_size": size} for size in (0.02, 0.1)},
    "ascent, 5 steps of .05, margin .01": CLIMBED | {"margin": 0.01},
    "ascent, best 20 boxes": CLIMBED | {"refine_top": 20},
    **{f"regression, {moves} steps": _REGRESSED | {"moves": moves} for moves in (1, 2, 3, 5)},
    **{f"regression, then 5 steps of {size}": BOTH | {"step_size": size} for size in (0.02, 0.05)},
    "regression, then 10 steps of .05": BOTH | {"steps": 10},
}


def moved_first(head: IoUPredictor, move: Any) -> Suppression:
    """Move every candidate, then rank and suppress."""
    ranked = Stage(head, **RANKED)

    def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (found,) = candidates
        return ranked(features, [found.replace(boxes=clip_boxes(move(features, found), features.image_sizes[0]))])

    return stage


def moved_last(head: IoUPredictor, move: Any) -> Suppression:
    """Thin the candidates, move what is left, then rank and suppress."""
    thinned, rest = Stage(head, **RANKED | {"nms": "iou", "score_alpha": 0.0}), moved_first(head, move)

    def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return rest(features, thinned(features, candidates))

    return stage


def many_starts(head: IoUPredictor) -> Any:
    """The ascent from the box and from others close by; the best predicted of where they end."""

    def move(features: FeatureMaps, found: Detections) -> Tensor:
        generator = torch.Generator().manual_seed(len(found))
        offsets = torch.randn(_STARTS, len(found), 4, generator=generator) * _SPREAD
        offsets[0] = 0
        starts = decode_boxes(offsets.flatten(0, 1), found.boxes.repeat(_STARTS, 1))
        many = Detections(starts, found.scores.repeat(_STARTS), found.labels.repeat(_STARTS))
        ends = climb(head, features, many)
        with torch.no_grad():
            ious = head.predict(head.encode(features), ends, torch.zeros_like(many.labels), many.labels)
        best = ious.view(_STARTS, -1).argmax(0)
        return ends.view(_STARTS, -1, 4)[best, torch.arange(len(found))]

    return move


def questions(lab: Lab, head: IoUPredictor) -> dict[str, Suppression]:
    """A stage for every variant."""
    return {name: Stage(head, **settings) for name, settings in SETTINGS.items()} | {
        "ascent, 5 steps of .05 up the IoU": Stage(ByIoU.of(head), **CLIMBED),
        "the paper's steps, in pixels": moved_last(head, partial(climb, head, by=refine_boxes_paper)),
        "ascent from 4 starts": moved_last(head, many_starts(head)),
        "ascent of all candidates, before suppression": moved_first(head, partial(climb, head)),
    }


if __name__ == "__main__":
    answer("ascent", questions, __doc__)
