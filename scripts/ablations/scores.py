"""Question 6: what to rank by, and what to score by. Boxes stay where they are, except where said.

Asked of the same three heads as question 5. A setting for ranking does not touch the reported scores, and the other
way round, so that moving boxes, choosing among them and scoring them are told apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps
from iou_refiner.training.loop import judgements
from iou_refiner.training.samples import TrainingSet
from scripts.ablations.harness import OWN, RANKED, Lab, answer
from scripts.results.rows import rising_map

_GUIDED = OWN | {"nms": "iou"}
_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_SCORED = (0.3, 0.5, 0.75)
_CALIBRATION_IMAGES = 200
_MOVED = RANKED | {"moves": 1}

SETTINGS: dict[str, dict[str, Any]] = {
    "the detector's own": OWN,
    "Soft-NMS": OWN | {"nms": "soft", "nms_threshold": 1.0, "rank_alpha": 0.0},
    **{f"IoU-guided NMS, α {a}": _GUIDED | {"rank_alpha": a} for a in _ALPHAS},
    **{f"scored, α {a}": OWN | {"score_alpha": a} for a in (*_SCORED, 1.0)},
    **{f"softly, ranked {a}": RANKED | {"rank_alpha": a, "score_alpha": 0.0} for a in (0.0, *_ALPHAS)},
    **{f"softly, ranked .5, scored {a}": RANKED | {"score_alpha": a} for a in _SCORED},
    **{f"the same, scored .3, first at {t}": RANKED | {"nms_threshold": t} for t in (0.6, 1.0)},
    **{f"regressed, softly, ranked .5, scored {a}": _MOVED | {"score_alpha": a} for a in _SCORED},
}


def calibrated(lab: Lab, head: IoUPredictor) -> dict[str, Suppression]:
    """Class score, and predicted IoU, mapped to the true IoU they stand for on images of the train split."""
    data = TrainingSet(lab.cache, lab.train)
    data.items = data.items[:: len(data) // _CALIBRATION_IMAGES]
    predicted, _, scores, truth = judgements(head, data).double().numpy()
    of_score, of_iou = rising_map(scores, truth), rising_map(predicted, truth)

    def mapped(by: Any, values: Tensor) -> Tensor:
        return torch.from_numpy(by(values.double().numpy())).to(values)

    detector, ranked = Stage(head, **OWN), Stage(head, **RANKED | {"score_alpha": 0.0})

    def by_score(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (kept,) = detector(features, candidates)
        return [kept.replace(scores=mapped(of_score, kept.scores))]

    def by_product(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        (kept,) = ranked(features, candidates)
        assert kept.ious is not None
        return [kept.replace(scores=kept.scores**0.7 * mapped(of_iou, kept.ious) ** 0.3)]

    return {"isotonic map of the class score": by_score, "softly, ranked .5, scored .3, IoU calibrated": by_product}


def questions(lab: Lab, head: IoUPredictor) -> dict[str, Suppression]:
    """A stage for every variant."""
    return {name: Stage(head, **settings) for name, settings in SETTINGS.items()} | calibrated(lab, head)


if __name__ == "__main__":
    answer("scores", questions, __doc__)
