"""The law of every stage: each box that comes in comes out, or is counted as suppressed or dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from iou_refiner.stage.stage import Stage
from iou_refiner.structures import Detections, FeatureMaps

#: A candidate as its box, score and label.
Row = tuple[Sequence[float], float, int]


def assert_every_box_is_accounted_for(
    stage: Stage, features: FeatureMaps | None, images: Sequence[Sequence[Row]]
) -> None:
    """Put candidates of some images through a new stage: its counts add up, and what comes out is finite."""
    candidates = [
        Detections(
            torch.tensor([box for box, _, _ in rows]).reshape(-1, 4),
            torch.tensor([score for _, score, _ in rows]),
            torch.tensor([label for _, _, label in rows], dtype=torch.int64),
        )
        for rows in images
    ]
    detections = stage(features, candidates)
    counts = stage.summary
    assert counts.candidates == sum(map(len, candidates))
    assert counts.detections == sum(map(len, detections))
    assert counts.suppressed >= 0
    assert counts.candidates == counts.detections + counts.suppressed + sum(counts.dropped.values())
    for image in detections:
        for column in (image.boxes, image.scores, image.ious):
            assert torch.isfinite(column).all()
