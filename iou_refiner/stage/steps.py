"""Steps of the stage that need nothing but the boxes, their scores and what is predicted of them."""

from __future__ import annotations

import torch
from torch import Tensor

from iou_refiner.stage.batch import FlatBatch
from iou_refiner.stage.nms import iou_guided_nms
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.soft_nms import soft_nms
from iou_refiner.stage.summary import Summary


def suppress(batch: FlatBatch, kind: str, settings: StageSettings) -> FlatBatch:
    """One box of each cluster, with the cluster's highest class score."""
    if kind == "none":
        return batch
    rank = _fuse(batch.scores, batch.ranking, 0.0 if kind == "greedy" else settings.rank_alpha)
    threshold = settings.nms_threshold
    keep, scores = iou_guided_nms(batch.boxes, batch.scores, rank, batch.group(), threshold=threshold)
    return batch[keep].replace(scores=scores)


def decay(batch: FlatBatch, settings: StageSettings) -> FlatBatch:
    """Soft-NMS in the order of the rank: a box keeps the share of its class score that it keeps of its rank."""
    rank = _fuse(batch.scores, batch.ranking, settings.rank_alpha)
    keep, decayed = soft_nms(batch.boxes, rank, batch.group())
    return batch[keep].replace(scores=batch.scores[keep] * (decayed / rank[keep]))


def rescore(batch: FlatBatch, settings: StageSettings) -> FlatBatch:
    """The class score and the predicted IoU in one score; a box without a prediction leaves with an IoU of 0."""
    scores = _fuse(batch.scores, batch.iou, settings.score_alpha)
    return batch.replace(scores=scores, iou=batch.iou.nan_to_num(0.0))


def finite(batch: FlatBatch, summary: Summary) -> FlatBatch:
    """The boxes whose coordinates and score are finite; the others are counted."""
    rows = batch[batch.finite()]
    summary.not_finite += len(batch) - len(rows)
    return rows


def _fuse(scores: Tensor, fit: Tensor, alpha: float) -> Tensor:
    """``scores^(1 - alpha) * fit^alpha`` (N,), exactly the one or the other at the ends.

    A box without a prediction (NaN) keeps its class score: it stands where the detector would have put it.
    """
    if alpha == 0:
        return scores
    fused = fit if alpha == 1 else scores.clamp(min=0) ** (1 - alpha) * fit.clamp(min=0) ** alpha
    return torch.where(torch.isnan(fit), scores, fused)
