"""The stage: predict, suppress, refine, suppress again, rescore. It takes the place of a detector's own NMS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iou_refiner.checks import DataError, check_fraction
from iou_refiner.head.checkpoint import Head
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.siblings.clusters import reach
from iou_refiner.stage.batch import FlatBatch
from iou_refiner.stage.by_iou import ByIoU
from iou_refiner.stage.by_siblings import judge_by_siblings
from iou_refiner.stage.nms import nms
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.steps import decay, finite, rescore, suppress
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
        head: Head,
        settings: StageSettings | None = None,
        *,
        own_threshold: float | None = 0.5,
        **changes: Any,
    ):
        self.head = head
        self.settings = (settings or _recommended(head)).replace(**changes)
        if isinstance(head, SiblingHead):
            self.settings = self.settings.replace(regression_steps=0, ascent_steps=0)
        elif not head.config.deltas:
            self.settings = self.settings.replace(regression_steps=0)
        if self.settings.siblings and head.siblings is None:
            raise ValueError("`siblings` needs a head with a network over siblings; this one was trained without.")
        if own_threshold is not None:
            check_fraction("own_threshold", own_threshold)
        if head.num_classes and self.settings.all_categories and not self.settings.siblings:
            raise ValueError("`all_categories` needs a head of one IoU for all classes; this one has one for each.")
        self.own_threshold = own_threshold
        self._trained = torch.tensor(sorted({category.label for category in head.metadata.categories}))
        self.summary = Summary()

    def __call__(self, features: FeatureMaps | None, candidates: list[Detections]) -> list[Detections]:
        """Detections of each image by falling score, with ``ious``; boxes clipped to the image, always finite.

        Args:
            features: feature maps of a batch of images; a head without features needs None.
            candidates: boxes before suppression in network pixels, one entry per image.

        Raises:
            ValueError: there are not as many entries as images.
        """
        if features is not None and len(candidates) != len(features):
            raise ValueError(
                f"`candidates` needs one entry per image, got {len(candidates)} for {len(features)} images."
            )
        if not candidates:
            return []
        # Tensors made in inference mode cannot take part in the ascent; what is made here can. The detector's own
        # tensors are only read, never differentiated.
        with torch.inference_mode(False), torch.no_grad():
            table = self._table(features)
            sizes = [_size(image) for image in candidates] if features is None else features.image_sizes
            batch = self._best_candidates(FlatBatch.of(candidates, sizes, self.head.device))
            batch, rest = self._split_by_training(batch)
            batch = self._better(table, batch)
            if rest is not None:
                batch = FlatBatch.concat([batch, self._of_other_categories(rest)])
            detections = self._best_detections(batch).split(candidates)
        self.summary.images += len(candidates)
        self.summary.candidates += sum(map(len, candidates))
        self.summary.detections += sum(map(len, detections))
        return detections

    def _table(self, features: FeatureMaps | None) -> FeatureTable | None:
        """The features laid out for pooling; None for a head that reads none."""
        if isinstance(self.head, SiblingHead):
            return None
        if features is None:
            raise ValueError("`features` must be given: this head reads the detector's feature maps.")
        return self.head.encode(_outside_inference_mode(features))

    def _better(self, table: FeatureTable | None, batch: FlatBatch) -> FlatBatch:
        """What the settings make of candidates."""
        settings = self.settings
        if settings.siblings:
            batch = self._judge(table, finite(batch, self.summary))
        elif isinstance(self.head, IoUHead) and table is not None:
            batch = ByIoU(self.head, settings, self.summary)(table, batch)
        else:
            batch = suppress(finite(batch, self.summary), settings.nms, settings)
        if settings.final_nms == "soft":
            batch = decay(batch, settings)
        elif settings.refines:
            batch = suppress(batch, settings.final_nms, settings)
        return rescore(batch, settings)

    def _judge(self, table: FeatureTable | None, batch: FlatBatch) -> FlatBatch:
        """The survivors as their siblings see them, with the features where there are any."""
        head, net = self.head, self.head.siblings
        assert net is not None

        def embed(boxes: FlatBatch) -> Tensor:
            assert isinstance(head, IoUHead)
            assert table is not None
            return head.roi_embedding(table, boxes.boxes, boxes.image_index)

        judged = judge_by_siblings(net, batch, None if table is None else embed, move=self.settings.sibling_move)
        if self.settings.refines:
            self.summary.refined += len(judged)
            self.summary.moved += len(judged)
        return judged

    def _of_other_categories(self, batch: FlatBatch) -> FlatBatch:
        """What becomes of boxes of categories that the head was not trained on: the features that it knows are of
        other objects, but siblings look alike everywhere."""
        if self.settings.siblings and self.settings.all_categories:
            return self._better(None, batch)
        self.summary.untrained += len(batch)
        batch = finite(batch, self.summary)
        if self.own_threshold is not None:
            batch = batch[nms(batch.boxes, batch.scores, batch.group(), threshold=self.own_threshold)]
        return batch.replace(iou=torch.zeros_like(batch.iou))

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
        if len(self._trained) and (self.settings.siblings or not self.settings.all_categories):
            trained = torch.isin(batch.labels, self._trained.to(batch.labels))
        if self.head.num_classes:
            trained &= (batch.labels >= 0) & (batch.labels < self.head.num_classes)
        if bool(trained.all()):
            return batch, None
        return batch[trained], batch[~trained]

    def _best_detections(self, batch: FlatBatch) -> FlatBatch:
        batch = batch.by_score()
        return batch[batch.topk_rows(self.settings.max_detections)]


def _recommended(head: Head) -> StageSettings:
    """The settings that a head recommends, which a file says and nobody has checked yet."""
    try:
        default = StageSettings.by_siblings() if head.siblings else StageSettings()
        return default.replace(**head.metadata.recommended)
    except (TypeError, ValueError) as error:
        raise DataError(f"The settings that the head recommends cannot be used: {error} Give settings.") from None


def _size(candidates: Detections) -> tuple[float, float]:
    """Height and width of an image of which nothing but its candidates is known."""
    width, height = reach(candidates.boxes)[:2].tolist()
    return height, width


def _outside_inference_mode(features: FeatureMaps) -> FeatureMaps:
    """The same maps as tensors that may enter an autograd graph: those made in inference mode are copied."""
    levels = tuple(level.clone() if level.is_inference() else level for level in features.levels)
    return FeatureMaps(levels, features.strides, features.image_sizes)
