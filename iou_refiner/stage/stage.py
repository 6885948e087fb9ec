"""The stage itself, predict - suppress - refine - rescore: what stands in the place of a detector's suppression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.pooling.table import FeaturePyramid
from iou_refiner.stage.ascent import refine_boxes
from iou_refiner.stage.nms import iou_guided_nms, nms, soft_nms
from iou_refiner.stage.settings import StageSettings
from iou_refiner.structures import Detections, FeatureMaps


@dataclass
class Summary:
    """What a stage has done so far, over all images.

    Attributes:
        images: seen.
        boxes: candidates that came in.
        kept: detections that went out.
        refined: boxes that were tried to be moved.
        moved: boxes that were.
        undone: ascent steps undone because the prediction was not finite.
        unpredicted: boxes whose IoU could not be predicted (features or box not finite). They stay where they are, keep
            their class score, and leave with an IoU of 0: no evidence that they fit.
    """

    images: int = 0
    boxes: int = 0
    kept: int = 0
    refined: int = 0
    moved: int = 0
    undone: int = 0
    unpredicted: int = 0

    def __str__(self) -> str:
        parts = [f"{self.images:,} images", f"{self.boxes:,} boxes in", f"{self.kept:,} out"]
        if self.refined:
            parts.append(f"refined {self.refined:,}: {self.moved:,} moved, {self.refined - self.moved:,} left in place")
        if self.undone or self.unpredicted:
            parts.append(f"{self.undone:,} non-finite steps undone, {self.unpredicted:,} boxes without a prediction")
        return "; ".join(parts)


class Stage:
    """Candidates in, better detections out: what replaces a detector's suppression.

    Args:
        head: the trained predictor.
        settings: fields of :class:`StageSettings`; default: what the head recommends, and its defaults.

    Attributes:
        settings: what it does.
        summary: counts over all calls.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    def __init__(self, head: IoUPredictor, **settings: Any):
        self.head = head
        self.settings = StageSettings.of(head, **settings)
        self.summary = Summary()

    def __call__(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """Detections of each image by falling score, with ``ious``; boxes clipped to the image, always finite.

        Args:
            features: maps of a batch of images.
            candidates: boxes before suppression, one entry per image, network frame.
        """
        # Tensors made in inference mode cannot take part in the ascent; what is made here can. The detector's own
        # tensors are only read, never differentiated.
        with torch.inference_mode(False), torch.no_grad():
            pyramid = self.head.encode(_plain(features))
            given = [
                found.to(pyramid.table.device).replace(boxes=clip_boxes(found.boxes, size).to(pyramid.table.device))
                for found, size in zip(candidates, features.image_sizes, strict=True)
            ]
            kept = [self._suppress(detections) for detections in self._predict(pyramid, given)]
            if self.moves_boxes:
                kept = self._refine(pyramid, kept, features.image_sizes)
            if self.settings.nms == "soft":
                kept = [self._decay(detections) for detections in kept]
            elif self.moves_boxes:
                kept = [self._suppress(detections) for detections in kept]
            kept = [self._rescore(detections).to(features.device) for detections in kept]
        self.summary.images += len(features)
        self.summary.boxes += sum(map(len, candidates))
        self.summary.kept += sum(map(len, kept))
        return kept

    @property
    def moves_boxes(self) -> bool:
        """Whether boxes that come out may lie elsewhere than they came in."""
        regresses = self.head.regress and self.settings.moves > 0
        return self.settings.refine_top > 0 and (regresses or self.settings.steps > 0)

    def _predict(self, pyramid: FeaturePyramid, candidates: list[Detections]) -> list[Detections]:
        boxes, image_index, labels = _flatten(candidates)
        ious, worths = self.head.judge(pyramid, boxes, image_index, labels)
        self.summary.unpredicted += int((~torch.isfinite(ious)).sum())
        counts = [len(c) for c in candidates]
        pieces = zip(candidates, ious.split(counts), worths.split(counts), strict=True)
        return [c.replace(ious=iou, worths=worth) for c, iou, worth in pieces]

    def _suppress(self, found: Detections) -> Detections:
        """One box of each cluster, with the cluster's highest class score."""
        found = found[torch.isfinite(found.boxes).all(1) & torch.isfinite(found.scores)]
        if self.settings.nms == "none":
            return found
        if self.settings.nms == "greedy":
            return found[nms(found.boxes, found.scores, found.labels, threshold=self.settings.nms_threshold)]
        rank = _fuse(found.scores, found.worths, self.settings.rank_alpha)
        keep, scores = iou_guided_nms(
            found.boxes, found.scores, rank, found.labels, threshold=self.settings.nms_threshold
        )
        return found[keep].replace(scores=scores)

    def _decay(self, found: Detections) -> Detections:
        """Soft-NMS in the order of the rank: a box keeps the share of its class score that it keeps of its rank."""
        rank = _fuse(found.scores, found.worths, self.settings.rank_alpha)
        keep, left = soft_nms(found.boxes, rank, found.labels)
        return found[keep].replace(scores=found.scores[keep] * (left / rank[keep]))

    def _refine(
        self, pyramid: FeaturePyramid, kept: list[Detections], image_sizes: tuple[tuple[int, int], ...]
    ) -> list[Detections]:
        """Regression, then ascent, of the best boxes of every image; put back where that made them worth no more."""
        best = [detections[detections.scores.argsort(descending=True, stable=True)] for detections in kept]
        tops = [detections[: self.settings.refine_top] for detections in best]
        start, image_index, labels = _flatten(tops)
        boxes = self._regress(pyramid, start, image_index, image_sizes)
        boxes = self._ascend(pyramid, boxes, image_index, labels, image_sizes)
        ious, worths = self.head.judge(pyramid, boxes, image_index, labels)
        gained = worths > torch.cat([_known(top.worths) for top in tops]) + self.settings.margin  # NaN never is
        moved = (boxes != start).any(1) & gained & torch.isfinite(ious)
        self.summary.refined += len(start)
        self.summary.moved += int(moved.sum())
        counts = [len(top) for top in tops]
        pieces = zip(*(part.split(counts) for part in (moved, boxes, ious, worths)), strict=True)
        return [_exchange(detections, *piece) for detections, piece in zip(best, pieces, strict=True)]

    def _regress(
        self, pyramid: FeaturePyramid, boxes: Tensor, image_index: Tensor, image_sizes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        for _ in range(self.settings.moves if self.head.regress else 0):
            moved = _clip(self.head.move(pyramid, boxes, image_index), image_index, image_sizes)
            boxes = torch.where(valid_boxes(moved)[:, None], moved, boxes)
        return boxes

    def _ascend(
        self,
        pyramid: FeaturePyramid,
        boxes: Tensor,
        image_index: Tensor,
        labels: Tensor,
        image_sizes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        if not self.settings.steps:
            return boxes
        level = self.head.finest_level(boxes)

        def score(moved: Tensor, rows: Tensor) -> Tensor:
            return self.head.worth(pyramid, moved, image_index[rows], labels[rows], level[rows])

        result = refine_boxes(score, boxes, steps=self.settings.steps, step_size=self.settings.step_size)
        self.summary.undone += result.undone
        climbed = _clip(result.boxes, image_index, image_sizes)
        return torch.where(valid_boxes(climbed)[:, None], climbed, boxes)

    def _rescore(self, kept: Detections) -> Detections:
        ious = _known(kept.ious)
        scores = _fuse(kept.scores, ious, self.settings.score_alpha)
        kept = kept.replace(scores=scores, ious=ious.nan_to_num(0.0), worths=None)
        return kept[kept.scores.argsort(descending=True, stable=True)[: self.settings.max_detections]]


def _plain(features: FeatureMaps) -> FeatureMaps:
    """The same maps as tensors that may enter an autograd graph: those made in inference mode are copied."""
    levels = tuple(level.clone() if level.is_inference() else level for level in features.levels)
    return FeatureMaps(levels, features.strides, features.image_sizes)


def _flatten(detections: list[Detections]) -> tuple[Tensor, Tensor, Tensor]:
    """All boxes (R, 4) of a batch in float32, the image of each (R,), and their labels (R,)."""
    counts = torch.tensor([len(d) for d in detections])
    index = torch.repeat_interleave(torch.arange(len(detections)), counts)
    boxes = torch.cat([d.boxes for d in detections]).float()
    return boxes, index.to(boxes.device), torch.cat([d.labels for d in detections])


def _clip(boxes: Tensor, image_index: Tensor, image_sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Boxes (R, 4) cut each to the size of its image."""
    sizes = boxes.new_tensor(image_sizes).reshape(-1, 2)[image_index].flip(1)  # (R, 2), width and height
    return torch.minimum(boxes.clamp(min=0), sizes.repeat(1, 2))


def _exchange(found: Detections, chosen: Tensor, boxes: Tensor, ious: Tensor, worths: Tensor) -> Detections:
    """Other boxes, IoUs and worths for the chosen (K,) bool of the first K detections."""
    rows = torch.nonzero(chosen).flatten()

    def exchanged(old: Tensor | None, new: Tensor) -> Tensor:
        return _known(old).index_copy(0, rows, new[rows].to(_known(old)))

    return found.replace(
        boxes=exchanged(found.boxes, boxes), ious=exchanged(found.ious, ious), worths=exchanged(found.worths, worths)
    )


def _known(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("These detections have not been judged by a head yet.")
    return values


def _fuse(scores: Tensor, by: Tensor | None, alpha: float) -> Tensor:
    """``scores^(1 - alpha) * by^alpha`` (N,), exactly the one or the other at the ends.

    A box that could not be judged (NaN) is fused to its class score: it stands where the detector would have put it.
    """
    if alpha == 0:
        return scores
    judged = _known(by)
    fused = judged if alpha == 1 else scores.clamp(min=0) ** (1 - alpha) * judged.clamp(min=0) ** alpha
    return torch.where(torch.isnan(judged), scores, fused)
