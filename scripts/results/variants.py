"""The settings of the stage whose gain is measured: each row differs in what it names, and in nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from iou_refiner.stage.settings import StageSettings


def variants(detector: StageSettings, chosen: StageSettings) -> dict[str, StageSettings]:
    """Settings of the stage for each row.

    Args:
        detector: what the detector does by itself.
        chosen: the thresholds, exponents and steps of the rows that have them.
    """
    rescoring = {"score_alpha": chosen.score_alpha}
    guided = {"nms": "iou_guided", "nms_threshold": chosen.nms_threshold, "rank_alpha": chosen.rank_alpha}
    ascent = {name: getattr(chosen, name) for name in ("ascent_steps", "ascent_step_size", "min_gain")}
    refined = detector.replace(final_nms=detector.nms)
    both = detector.replace(**rescoring, **guided, final_nms="iou_guided")
    return {
        "detector": detector,
        "Soft-NMS": detector.replace(nms="none", final_nms="soft"),
        "rescoring": detector.replace(**rescoring),
        "IoU-guided NMS": detector.replace(**guided),
        "ascent": refined.replace(**ascent),
        "regression": refined.replace(regression_steps=1),
        "rescoring + IoU-guided NMS": both,
        "the same + ascent": both.replace(**ascent),
        "the same + regression": both.replace(regression_steps=1),
        "the same + regression, Soft-NMS": both.replace(regression_steps=1, nms_threshold=0.8, final_nms="soft"),
        "the paper's pipeline": StageSettings.paper(),
    }


def every_candidate(settings: StageSettings) -> StageSettings:
    """The same refinement of all candidates, all of which stay."""
    return settings.replace(nms="none", final_nms="none", refine_topk=10_000, max_detections=10_000)


def one_at_a_time() -> Iterator[dict[str, Any]]:
    """Changes to what the detector does by itself, to look at one setting after another on val."""
    yield {}
    for alpha in (0.3, 0.5, 0.7):
        yield {"score_alpha": alpha}
    guided = {"nms": "iou_guided", "nms_threshold": 0.5}
    for alpha in (0.25, 0.5, 0.75, 1.0):
        yield guided | {"rank_alpha": alpha}
    for threshold in (0.4, 0.6, 0.65):
        yield guided | {"nms_threshold": threshold, "rank_alpha": 0.5}
    ascent = {"final_nms": "greedy", "ascent_steps": 5}
    for size in (0.025, 0.05, 0.1, 0.2):
        yield ascent | {"ascent_step_size": size}
    for gain in (0.005, 0.01, 0.02):
        yield ascent | {"ascent_step_size": 0.05, "min_gain": gain}
