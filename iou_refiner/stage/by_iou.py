"""The way through the stage by the predicted IoU: predict, suppress, refine."""

from __future__ import annotations

import torch
from torch import Tensor

from iou_refiner.head.iou_head import IoUHead, Prediction
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.stage.ascent import refine_boxes, refine_boxes_paper
from iou_refiner.stage.batch import FlatBatch
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.steps import finite, suppress
from iou_refiner.stage.summary import Summary


class ByIoU:
    """Suppress candidates and refine what is left, by what a head predicts of each box.

    Args:
        head: the head.
        settings: what to do.
        summary: where it is counted.
    """

    def __init__(self, head: IoUHead, settings: StageSettings, summary: Summary):
        self.head, self.settings, self.summary = head, settings, summary

    def __call__(self, table: FeatureTable, batch: FlatBatch) -> FlatBatch:
        """What is left of candidates, refined, with its predictions."""
        batch = batch.with_prediction(self._predict(table, batch))
        self.summary.unpredicted += int((~torch.isfinite(batch.iou)).sum())
        batch = suppress(finite(batch, self.summary), self.settings.nms, self.settings)
        return self._refine(table, batch) if self.settings.refines else batch

    def _predict(self, table: FeatureTable, batch: FlatBatch) -> Prediction:
        prediction = self.head.predict(table, batch.boxes, batch.image_index, batch.labels)
        return Prediction(prediction.iou, prediction.iou) if self.settings.rank_by == "iou" else prediction

    def _refine(self, table: FeatureTable, batch: FlatBatch) -> FlatBatch:
        """Regression, then ascent, of the best boxes of every image; boxes that gain too little return."""
        batch = batch.by_score()
        top = batch.topk_rows(self.settings.refine_topk)
        start = batch[top]
        refined = self._regress(table, start)
        refined = self._ascend(table, refined)
        refined = refined.with_prediction(self._predict(table, refined))
        gained = refined.ranking > start.ranking + self.settings.min_gain  # NaN never is
        if self.settings.ascent == "paper":
            gained = torch.ones_like(gained)
        moved = (refined.boxes != start.boxes).any(1) & gained & torch.isfinite(refined.iou)
        self.summary.refined += len(start)
        self.summary.moved += int(moved.sum())
        return batch.updated(top[moved], refined[moved])

    def _regress(self, table: FeatureTable, batch: FlatBatch) -> FlatBatch:
        for _ in range(self.settings.regression_steps):
            batch = batch.moved_to(self.head.regress(table, batch.boxes, batch.image_index, batch.labels))
        return batch

    def _ascend(self, table: FeatureTable, batch: FlatBatch) -> FlatBatch:
        if not self.settings.ascent_steps:
            return batch
        level = self.head.finest_level(batch.boxes)

        def score(boxes: Tensor, rows: Tensor) -> Tensor:
            prediction = self.head(table, boxes, batch.image_index[rows], batch.labels[rows], level[rows])
            ranking: Tensor = prediction.iou if self.settings.rank_by == "iou" else prediction.ranking
            return ranking

        ascend = refine_boxes_paper if self.settings.ascent == "paper" else refine_boxes
        steps, step_size = self.settings.ascent_steps, self.settings.ascent_step_size
        result = ascend(score, batch.boxes, steps=steps, step_size=step_size)
        self.summary.undone += result.undone
        return batch.moved_to(result.boxes)
