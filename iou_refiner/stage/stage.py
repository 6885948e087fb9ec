"""The stage: predict, suppress, refine, suppress again, rescore. It takes the place of a detector's own NMS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iou_refiner.checks import DataError, check_fraction
from iou_refiner.head.iou_head import IoUHead, Prediction
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.stage.ascent import refine_boxes, refine_boxes_paper
from iou_refiner.stage.batch import FlatBatch
from iou_refiner.stage.nms import iou_guided_nms, nms
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.soft_nms import soft_nms
from iou_refiner.stage.summary import Summary as Summary
from iou_refiner.structures import Detections, FeatureMaps


class Stage:
    """Candidates in, better detections out.

    Args:
        head: the trained head.
        settings: what to do; default: what the head recommends.
        own_threshold: of the detector's own greedy NMS, which boxes of categories that the head was not trained on
            get; None for a detector without one.
        changes: settings to exchange in these, by name.

    Attributes:
        settings: what it does.
        summary: counts over all calls.

    Raises:
        ValueError: a setting is unknown or out of range, or ``all_categories`` is asked of a head that predicts one IoU
            for each class.
        DataError: the settings that the head recommends are.
    """

    def __init__(
        self,
        head: IoUHead,
        settings: StageSettings | None = None,
        *,
        own_threshold: float | None = 0.5,
        **changes: Any,
    ):
        self.head = head
        self.settings = (settings or _recommended(head)).replace(**changes)
        if not head.config.deltas:
            self.settings = self.settings.replace(regression_steps=0)
        if own_threshold is not None:
            check_fraction("own_threshold", own_threshold)
        if head.num_classes and self.settings.all_categories:
            raise ValueError("`all_categories` needs a head of one IoU for all classes; this one has one for each.")
        self.own_threshold = own_threshold
        self._trained = torch.tensor(sorted({category.label for category in head.metadata.categories}))
        self.summary = Summary()

    def __call__(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """Detections of each image by falling score, with ``ious``; boxes clipped to the image, always finite.

        Args:
            features: feature maps of a batch of images.
            candidates: boxes before suppression in network pixels, one entry per image.

        Raises:
            ValueError: there are not as many entries as images.
        """
        if len(candidates) != len(features):
            raise ValueError(
                f"`candidates` needs one entry per image, got {len(candidates)} for {len(features)} images."
            )
        if not candidates:
            return []
        # Tensors made in inference mode cannot take part in the ascent; what is made here can. The detector's own
        # tensors are only read, never differentiated.
        with torch.inference_mode(False), torch.no_grad():
            table = self.head.encode(_outside_inference_mode(features))
            batch = self._best_candidates(FlatBatch.of(candidates, features.image_sizes, table.device))
            batch, rest = self._split_by_training(batch)
            batch = batch.with_prediction(self._predict(table, batch))
            self.summary.unpredicted += int((~torch.isfinite(batch.iou)).sum())
            batch = self._suppress(self._finite(batch), self.settings.nms)
            if self.settings.refines:
                batch = self._refine(table, batch)
            if self.settings.final_nms == "soft":
                batch = self._decay(batch)
            elif self.settings.refines:
                batch = self._suppress(batch, self.settings.final_nms)
            batch = self._rescore(batch)
            if rest is not None:
                batch = FlatBatch.concat([batch, self._as_the_detector(rest)])
            detections = self._best_detections(batch).split(candidates)
        self.summary.images += len(features)
        self.summary.candidates += sum(map(len, candidates))
        self.summary.detections += sum(map(len, detections))
        return detections

    def _best_candidates(self, batch: FlatBatch) -> FlatBatch:
        """At most ``max_candidates`` of each image, in their order."""
        if len(batch) <= self.settings.max_candidates:
            return batch
        best = batch.replace(scores=batch.scores.nan_to_num(-torch.inf)).by_score()
        rows = best.row[best.topk_rows(self.settings.max_candidates)].sort().values
        self.summary.beyond += len(batch) - len(rows)
        return batch[rows]

    def _split_by_training(self, batch: FlatBatch) -> tuple[FlatBatch, FlatBatch | None]:
        """The boxes of categories that the head was trained on, and the others, if there are any."""
        trained = torch.ones_like(batch.labels, dtype=torch.bool)
        if len(self._trained) and not self.settings.all_categories:
            trained = torch.isin(batch.labels, self._trained.to(batch.labels))
        if self.head.num_classes:
            trained &= (batch.labels >= 0) & (batch.labels < self.head.num_classes)
        if bool(trained.all()):
            return batch, None
        self.summary.untrained += int((~trained).sum())
        return batch[trained], batch[~trained]

    def _as_the_detector(self, batch: FlatBatch) -> FlatBatch:
        """What the detector's own suppression leaves, boxes and scores as they are; nothing says how well they fit."""
        batch = self._finite(batch)
        if self.own_threshold is not None:
            batch = batch[nms(batch.boxes, batch.scores, batch.group(), threshold=self.own_threshold)]
        return batch.replace(iou=torch.zeros_like(batch.iou))

    def _finite(self, batch: FlatBatch) -> FlatBatch:
        finite = batch[batch.finite()]
        self.summary.not_finite += len(batch) - len(finite)
        return finite

    def _predict(self, table: FeatureTable, batch: FlatBatch) -> Prediction:
        prediction = self.head.predict(table, batch.boxes, batch.image_index, batch.labels)
        return Prediction(prediction.iou, prediction.iou) if self.settings.rank_by == "iou" else prediction

    def _rank(self, batch: FlatBatch, alpha: float) -> Tensor:
        return _fuse(batch.scores, batch.ranking, alpha)

    def _suppress(self, batch: FlatBatch, kind: str) -> FlatBatch:
        """One box of each cluster, with the cluster's highest class score."""
        if kind == "none":
            return batch
        rank = self._rank(batch, 0.0 if kind == "greedy" else self.settings.rank_alpha)
        threshold = self.settings.nms_threshold
        keep, scores = iou_guided_nms(batch.boxes, batch.scores, rank, batch.group(), threshold=threshold)
        return batch[keep].replace(scores=scores)

    def _decay(self, batch: FlatBatch) -> FlatBatch:
        """Soft-NMS in the order of the rank: a box keeps the share of its class score that it keeps of its rank."""
        rank = self._rank(batch, self.settings.rank_alpha)
        keep, decayed = soft_nms(batch.boxes, rank, batch.group())
        return batch[keep].replace(scores=batch.scores[keep] * (decayed / rank[keep]))

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
            batch = batch.moved_to(self.head.regress(table, batch.boxes, batch.image_index))
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

    def _rescore(self, batch: FlatBatch) -> FlatBatch:
        scores = _fuse(batch.scores, batch.iou, self.settings.score_alpha)
        return batch.replace(scores=scores, iou=batch.iou.nan_to_num(0.0))

    def _best_detections(self, batch: FlatBatch) -> FlatBatch:
        batch = batch.by_score()
        return batch[batch.topk_rows(self.settings.max_detections)]


def _recommended(head: IoUHead) -> StageSettings:
    """The settings that a head recommends, which a file says and nobody has checked yet."""
    try:
        return StageSettings().replace(**head.metadata.recommended)
    except (TypeError, ValueError) as error:
        raise DataError(f"The settings that the head recommends cannot be used: {error} Give settings.") from None


def _outside_inference_mode(features: FeatureMaps) -> FeatureMaps:
    """The same maps as tensors that may enter an autograd graph: those made in inference mode are copied."""
    levels = tuple(level.clone() if level.is_inference() else level for level in features.levels)
    return FeatureMaps(levels, features.strides, features.image_sizes)


def _fuse(scores: Tensor, fit: Tensor, alpha: float) -> Tensor:
    """``scores^(1 - alpha) * fit^alpha`` (N,), exactly the one or the other at the ends.

    A box without a prediction (NaN) keeps its class score: it stands where the detector would have put it.
    """
    if alpha == 0:
        return scores
    fused = fit if alpha == 1 else scores.clamp(min=0) ** (1 - alpha) * fit.clamp(min=0) ** alpha
    return torch.where(torch.isnan(fit), scores, fused)
