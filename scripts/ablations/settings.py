"""The settings of the stage that heads are measured with. All else that an ablation measures is a change to these."""

from __future__ import annotations

from iou_refiner.stage.settings import StageSettings

#: What the detector does by itself.
DETECTOR = StageSettings.detector_only()
#: Suppressed and scored as by default, with all boxes left in place.
RANKED = StageSettings(
    nms="iou_guided", nms_threshold=0.8, final_nms="soft", rank_alpha=0.5, regression_steps=0, ascent_steps=0,
    score_alpha=0.3,
)  # fmt: skip
#: The same with five steps of the ascent.
ASCENT = RANKED.replace(ascent_steps=5, ascent_step_size=0.05)
#: The same with one step of regression before them.
BOTH = ASCENT.replace(regression_steps=1)
