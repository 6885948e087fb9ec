"""Ablation 6: what to rank by, and what to score by. Boxes stay where they are, unless the name says otherwise.

It uses the same three heads as ablation 5. A setting for ranking does not touch the reported scores, and a setting for
scoring does not touch the ranking, so that refining boxes, choosing among them and scoring them are told apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iou_refiner.coco.data import FloatArray
from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.loop import predict_candidates
from iou_refiner.training.samples import TrainingSet
from scripts.ablations.harness import run_stage_ablation
from scripts.ablations.settings import DETECTOR, RANKED
from scripts.ablations.testbed import Testbed
from scripts.results.isotonic import rising_map

_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_SCORED = (0.3, 0.5, 0.75)
_CALIBRATION_IMAGES = 200
_GUIDED = DETECTOR.replace(nms="iou_guided")
_REGRESSED = RANKED.replace(regression_steps=1)

SETTINGS: dict[str, StageSettings] = {
    "the detector's own": DETECTOR,
    "Soft-NMS": DETECTOR.replace(nms="none", final_nms="soft"),
    **{f"IoU-guided NMS, α {a}": _GUIDED.replace(rank_alpha=a) for a in _ALPHAS},
    **{f"scored, α {a}": DETECTOR.replace(score_alpha=a) for a in (*_SCORED, 1.0)},
    **{f"Soft-NMS, ranked {a}": RANKED.replace(rank_alpha=a, score_alpha=0.0) for a in (0.0, *_ALPHAS)},
    **{f"Soft-NMS, ranked .5, scored {a}": RANKED.replace(score_alpha=a) for a in _SCORED},
    **{f"the same, scored .3, first at {t}": RANKED.replace(nms_threshold=t) for t in (0.6, 1.0)},
    **{f"regressed, Soft-NMS, ranked .5, scored {a}": _REGRESSED.replace(score_alpha=a) for a in _SCORED},
}


def calibrated(bed: Testbed, head: IoUHead) -> dict[str, Suppression]:
    """Class score, and predicted IoU, mapped to the true IoU that they stand for on images of the train split."""
    data = TrainingSet(bed.cache, bed.train_truth)
    data.items = data.items[:: max(1, len(data) // _CALIBRATION_IMAGES)]
    iou, _, scores, true_iou = predict_candidates(head, data).double().numpy()
    of_score, of_iou = rising_map(scores, true_iou), rising_map(iou, true_iou)

    def mapped(by: Callable[[FloatArray], FloatArray], values: Tensor) -> Tensor:
        return torch.from_numpy(by(values.double().numpy())).to(values)

    detector, ranked = Stage(head, DETECTOR), Stage(head, RANKED.replace(score_alpha=0.0))

    def by_score(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (image,) = detector(features, candidates)
        return [image.replace(scores=mapped(of_score, image.scores))]

    def by_product(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (image,) = ranked(features, candidates)
        assert image.ious is not None
        return [image.replace(scores=image.scores**0.7 * mapped(of_iou, image.ious) ** 0.3)]

    return {"isotonic map of the class score": by_score, "Soft-NMS, ranked .5, scored .3, IoU calibrated": by_product}


def stages(bed: Testbed, head: IoUHead) -> dict[str, Suppression]:
    """A stage for every variant."""
    return {name: Stage(head, settings) for name, settings in SETTINGS.items()} | calibrated(bed, head)


if __name__ == "__main__":
    run_stage_ablation("scores", stages, __doc__)
