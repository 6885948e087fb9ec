"""Ablation 5: how to refine boxes. Several forms of the ascent, regression, both, and when.

All of it with the same three heads, each trained with the defaults; nothing else is trained.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from iou_refiner.boxes import clip_boxes, decode_boxes
from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.ascent import refine_boxes_paper
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from scripts.ablations.harness import run_stage_ablation
from scripts.ablations.refinement import Refine, ascend
from scripts.ablations.settings import ASCENT, BOTH, RANKED
from scripts.ablations.testbed import Testbed

_STARTS = 4
_SPREAD = 0.05  # of the further starts, in relative coordinates


def steps(count: int) -> str:
    """The number of steps as the names of variants spell it."""
    return f"{count} step{'s' * (count > 1)}"


SETTINGS: dict[str, StageSettings] = {
    "no move": RANKED,
    **{f"ascent, {steps(n)} of .05": ASCENT.replace(ascent_steps=n) for n in (1, 2, 5, 10, 20)},
    **{f"ascent, 5 steps of {size}": ASCENT.replace(ascent_step_size=size) for size in (0.02, 0.1)},
    "ascent, 5 steps of .05, min gain .01": ASCENT.replace(min_gain=0.01),
    "ascent, best 20 boxes": ASCENT.replace(refine_topk=20),
    **{f"regression, {steps(n)}": RANKED.replace(regression_steps=n) for n in (1, 2, 3, 5)},
    **{f"regression, then 5 steps of {size}": BOTH.replace(ascent_step_size=size) for size in (0.02, 0.05)},
    "regression, then 10 steps of .05": BOTH.replace(ascent_steps=10),
    "ascent, 5 steps of .05 up the IoU": ASCENT.replace(rank_by="iou"),
}


def refined_first(head: IoUHead, refine: Refine) -> Suppression:
    """Refine every candidate, then rank and suppress."""
    rank = Stage(head, RANKED)

    def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (image,) = candidates
        boxes = clip_boxes(refine(features, image), features.image_sizes[0])
        return rank(features, [image.replace(boxes=boxes)])

    return stage


def refined_last(head: IoUHead, refine: Refine) -> Suppression:
    """Suppress, refine the boxes that are left, then rank and suppress again."""
    suppress, rest = Stage(head, RANKED.replace(final_nms="none", score_alpha=0.0)), refined_first(head, refine)

    def stage(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return rest(features, suppress(features, candidates))

    return stage


def many_starts(head: IoUHead) -> Refine:
    """The ascent from the box and from others close by; of where they end, the box with the highest predicted IoU."""

    def refine(features: FeatureMaps, image: Detections) -> Tensor:
        generator = torch.Generator().manual_seed(len(image))
        offsets = torch.randn(_STARTS, len(image), 4, generator=generator) * _SPREAD
        offsets[0] = 0
        starts = decode_boxes(offsets.flatten(0, 1), image.boxes.repeat(_STARTS, 1))
        many = Detections(starts, image.scores.repeat(_STARTS), image.labels.repeat(_STARTS))
        ends = ascend(head, features, many)
        with torch.no_grad():
            table = head.encode(features)
        iou = head.predict(table, ends, torch.zeros_like(many.labels), many.labels).iou
        best = iou.view(_STARTS, -1).argmax(0)
        return ends.view(_STARTS, -1, 4)[best, torch.arange(len(image))]

    return refine


def stages(bed: Testbed, head: IoUHead) -> dict[str, Suppression]:
    """A stage for every variant."""
    return {name: Stage(head, settings) for name, settings in SETTINGS.items()} | {
        "the paper's steps, in pixels": refined_last(head, partial(ascend, head, ascent=refine_boxes_paper)),
        "ascent from 4 starts": refined_last(head, many_starts(head)),
        "ascent of all candidates, before suppression": refined_first(head, partial(ascend, head)),
    }


if __name__ == "__main__":
    run_stage_ablation("ascent", stages, __doc__)
