"""The stage itself, predict - suppress - refine - rescore, and the wrapper that puts it into a live detector."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iou_refiner._checks import check_choice, check_fraction, check_positive
from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.data import Detections, FeatureMaps
from iou_refiner.detectors import as_adapter
from iou_refiner.extraction import Adapter
from iou_refiner.nms import iou_guided_nms, nms, soft_nms
from iou_refiner.pooling import FeaturePyramid
from iou_refiner.predictor import IoUPredictor
from iou_refiner.refine import refine_boxes


@dataclass
class Summary:
    """What a stage has done so far, over all images.

    Attributes:
        images: seen.
        boxes: candidates that came in.
        kept: detections that went out.
        refined: boxes that entered the ascent.
        moved: boxes it moved.
        undone: ascent steps undone because the predicted IoU was not finite.
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


@dataclass(frozen=True)
class StageSettings:
    """What a stage does, in the order in which it does it.

    Args:
        nms: ``"iou"`` suppresses by predicted IoU (Algorithm 1), ``"greedy"`` by class score, ``"soft"`` decays scores
            (Soft-NMS), ``"none"`` keeps every box, for detectors without duplicates and files already suppressed.
        nms_threshold: IoU above which boxes of one class are one cluster.
        rank_alpha: IoU-guided NMS ranks by ``score^(1 - rank_alpha) * iou^rank_alpha``; 1 is Algorithm 1.
        steps: steps of the ascent; 0 moves nothing.
        step_size, margin: see :func:`refine_boxes`.
        refine_top: boxes refined per image, best scores first.
        score_alpha: detections are scored ``score^(1 - score_alpha) * iou^score_alpha``; 0 leaves the class score.
        max_detections: detections per image.

    Raises:
        ValueError: a setting is out of range.
    """

    nms: str = "iou"
    nms_threshold: float = 0.5
    rank_alpha: float = 0.75
    steps: int = 5
    step_size: float = 0.05
    margin: float = 0.0
    refine_top: int = 100
    score_alpha: float = 0.0
    max_detections: int = 100

    def __post_init__(self) -> None:
        check_choice("nms", self.nms, ["iou", "greedy", "soft", "none"])
        check_positive("step_size", self.step_size)
        check_positive("max_detections", self.max_detections)
        for name in ("nms_threshold", "rank_alpha", "score_alpha"):
            check_fraction(name, getattr(self, name))
        for name in ("steps", "refine_top", "margin"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")

    @classmethod
    def of(cls, head: IoUPredictor, **changes: Any) -> StageSettings:
        """The settings recommended for a head, with some exchanged; a change to None is no change."""
        known = [field.name for field in fields(cls)]
        for name in changes:
            check_choice("setting", name, known)
        return cls(**{**head.recommended, **{name: value for name, value in changes.items() if value is not None}})


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
            found = self._predict(pyramid, [c.to(pyramid.table.device) for c in candidates])
            kept = [self._suppress(detections) for detections in found]
            if self.settings.steps and self.settings.refine_top:
                kept = self._refine(pyramid, kept, features.image_sizes)
                if self.settings.nms in ("iou", "greedy"):
                    # Boxes that have come to rest on one object are one detection.
                    kept = [self._suppress(detections) for detections in kept]
            kept = [self._rescore(detections).to(features.device) for detections in kept]
        self.summary.images += len(features)
        self.summary.boxes += sum(map(len, candidates))
        self.summary.kept += sum(map(len, kept))
        return kept

    def _predict(self, pyramid: FeaturePyramid, candidates: list[Detections]) -> list[Detections]:
        boxes, image_index, labels = _flatten(candidates)
        ious = self.head.predict(pyramid, boxes, image_index, labels)
        self.summary.unpredicted += int((~torch.isfinite(ious)).sum())
        pieces = ious.split([len(c) for c in candidates])
        return [c.replace(ious=iou) for c, iou in zip(candidates, pieces, strict=True)]

    def _suppress(self, found: Detections) -> Detections:
        found = found[torch.isfinite(found.boxes).all(1) & torch.isfinite(found.scores)]
        threshold = self.settings.nms_threshold
        if self.settings.nms == "iou":
            rank = _fuse(found, self.settings.rank_alpha)
            keep, scores = iou_guided_nms(found.boxes, found.scores, rank, found.labels, threshold=threshold)
        elif self.settings.nms == "soft":
            keep, scores = soft_nms(found.boxes, found.scores, found.labels, threshold=threshold)
        elif self.settings.nms == "greedy":
            keep = nms(found.boxes, found.scores, found.labels, threshold=threshold)
            scores = found.scores[keep]
        else:
            keep, scores = torch.arange(len(found), device=found.scores.device), found.scores
        found = found[keep].replace(scores=scores)
        order = _fuse(found, self.settings.score_alpha).argsort(descending=True, stable=True)
        return found[order[: self.settings.max_detections]]

    def _refine(
        self, pyramid: FeaturePyramid, kept: list[Detections], image_sizes: tuple[tuple[int, int], ...]
    ) -> list[Detections]:
        best = [detections[detections.scores.argsort(descending=True, stable=True)] for detections in kept]
        boxes, image_index, labels = _flatten([detections[: self.settings.refine_top] for detections in best])
        level = self.head.levels_of(boxes)

        def score(moved: Tensor, rows: Tensor) -> Tensor:
            raw = self.head(pyramid, moved, image_index[rows], labels[rows], None if level is None else level[rows])
            return self.head.iou(raw)

        result = refine_boxes(
            score, boxes, steps=self.settings.steps, step_size=self.settings.step_size, margin=self.settings.margin
        )
        self.summary.refined += len(boxes)
        self.summary.moved += int(result.moved.sum())
        self.summary.undone += result.undone
        refined, start = [], 0
        for detections, size in zip(best, image_sizes, strict=True):
            count = min(len(detections), self.settings.refine_top)
            part = slice(start, start + count)
            start += count
            new = clip_boxes(result.boxes[part], size)
            use = result.moved[part] & valid_boxes(new)
            new_boxes, new_ious = detections.boxes.clone(), _ious(detections).clone()
            new_boxes[:count] = torch.where(use[:, None], new, new_boxes[:count])
            new_ious[:count] = torch.where(use, result.score[part], new_ious[:count])
            refined.append(detections.replace(boxes=new_boxes, ious=new_ious))
        return refined

    def _rescore(self, kept: Detections) -> Detections:
        kept = kept.replace(scores=_fuse(kept, self.settings.score_alpha), ious=_ious(kept).nan_to_num(0.0))
        return kept[kept.scores.argsort(descending=True, stable=True)]


class IoURefiner(nn.Module):
    """A frozen detector with the stage in place of its suppression: same call, same output, plus ``ious``.

    Args:
        detector: a live detector of a framework an adapter is installed for, or an :class:`Adapter`.
        head: a trained :class:`IoUPredictor`, or the path of one. Without a head the detector answers alone, untouched.
        settings: of the :class:`Stage`.

    Raises:
        TypeError: no adapter knows the detector. ValueError: the head was trained on another detector.

    A detector in training mode is called as it is: there are no detections to refine.
    """

    def __init__(self, detector: Any, head: IoUPredictor | str | Path | None = None, **settings: Any):
        super().__init__()
        self.adapter = as_adapter(detector)
        self.detector = self.adapter.detector
        self.stage: Stage | None = None
        if head is None:
            if settings:
                raise ValueError(f"Settings of the stage ({', '.join(settings)}) need a `head`.")
            return
        if not isinstance(head, IoUPredictor):
            head = IoUPredictor.load(head)
        check_head(head, self.adapter)
        self.head = head.to(self.adapter.device).eval()
        self.stage = Stage(self.head, **settings)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the detector's own call; boxes, scores and labels are the stage's."""
        if self.stage is None or getattr(self.detector, "training", False):
            return self.detector(*args, **kwargs)
        return self.adapter.run(self.stage, *args, **kwargs)


def check_head(head: IoUPredictor, adapter: Adapter) -> None:
    """Raise ValueError if the head says that it was trained on the features of another detector."""
    if head.detector and head.detector != adapter.fingerprint():
        raise ValueError(
            "The head was trained on a detector with other weights (fingerprint "
            f"{head.detector[:12]}, this one {adapter.fingerprint()[:12]}): its predictions would mean nothing here. "
            "Use the detector it was trained on, or train a head for this one."
        )


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


def _ious(detections: Detections) -> Tensor:
    if detections.ious is None:
        raise ValueError("These detections have no predicted IoU yet.")
    return detections.ious


def _fuse(found: Detections, alpha: float) -> Tensor:
    """``score^(1 - alpha) * iou^alpha`` (N,), exactly the one or the other at the ends.

    A box without a predicted IoU (NaN) is fused to its class score: it stands where the detector would have put it.
    """
    scores, ious = found.scores, _ious(found)
    if alpha == 0:
        return scores
    fused = ious if alpha == 1 else scores.clamp(min=0) ** (1 - alpha) * ious.clamp(min=0) ** alpha
    return torch.where(torch.isnan(ious), scores, fused)
