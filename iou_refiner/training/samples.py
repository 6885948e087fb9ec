"""What the head is trained on: boxes of an image with their true IoU.

Two sources are mixed. *Jittered ground truth* covers all IoU evenly, as in the paper. *The detector's own candidates*
are the boxes the head will have to predict for; among them those below IoU 0.5 count too, since a head that never saw
them believes that everything fits. Boxes in ignored regions are left out: nothing says how well they fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from iou_refiner.boxes import box_area, clip_boxes, valid_boxes
from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Image, xywh_to_xyxy
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.sources import ViewSource
from iou_refiner.detector.views import View
from iou_refiner.evaluation.true_iou import match_boxes
from iou_refiner.training.jitter import jitter_boxes

# Share of an object that a view must show for its box to be one to learn from.
_LEAST_VISIBLE = 0.25


@dataclass(frozen=True, eq=False)
class Targets:
    """The annotation of one image, in network pixels.

    Attributes:
        gt_boxes: (G, 4) float32 xyxy, the annotated objects.
        gt_labels: (G,) int64, the detector's class numbers.
        ignored_boxes: (K, 4) float32 xyxy, regions in which boxes are not judged: crowds, and objects mostly outside
            the view, of which nobody can say where they end.
        ignored_labels: (K,) int64.
    """

    gt_boxes: Tensor
    gt_labels: Tensor
    ignored_boxes: Tensor
    ignored_labels: Tensor

    def match(self, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The true IoU (R,) of boxes (R, 4) with labels (R,), NaN where they are not judged, and the object (R, 4) each
        fits best; the box itself where the image has no object. See
        :func:`~iou_refiner.evaluation.true_iou.match_boxes`."""
        everything = torch.cat([self.gt_boxes, self.ignored_boxes])
        ignored = np.arange(len(everything)) >= len(self.gt_boxes)
        all_labels = torch.cat([self.gt_labels, self.ignored_labels])
        overlap, best = match_boxes(boxes.numpy(), labels.numpy(), everything.numpy(), all_labels.numpy(), ignored)
        iou = torch.from_numpy(overlap)
        return iou, self.gt_boxes[torch.from_numpy(best)] if len(self.gt_boxes) else boxes

    def true_iou(self, boxes: Tensor, labels: Tensor) -> Tensor:
        """The first part of :meth:`match`."""
        return self.match(boxes, labels)[0]


@dataclass(frozen=True, eq=False)
class Samples:
    """Boxes to train on, with their truth.

    Attributes:
        boxes: (R, 4) float32 xyxy in network pixels.
        labels: (R,) int64.
        iou: (R,) float32, IoU with the best object of the same class.
        gt_boxes: (R, 4) float32 xyxy, that object; the box itself where the image has none.
    """

    boxes: Tensor
    labels: Tensor
    iou: Tensor
    gt_boxes: Tensor

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.boxes)

    def __getitem__(self, rows: Tensor) -> Samples:
        """The samples of these rows."""
        return Samples(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device) -> Samples:
        """The same on another device."""
        return Samples(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def packed(self) -> Tensor:
        """All of it as one tensor (R, 10) float64, which holds labels and float32 exactly."""
        columns = (self.boxes, self.labels[:, None], self.iou[:, None], self.gt_boxes)
        return torch.cat([column.double() for column in columns], 1)

    @classmethod
    def unpacked(cls, rows: Tensor) -> Samples:
        """The inverse of :meth:`packed`."""
        return cls(rows[:, :4].float(), rows[:, 4].long(), rows[:, 5].float(), rows[:, 6:].float())


class TrainingSet:
    """Extractions joined with their annotation. It holds ids and boxes, and asks for features as they are needed.

    Args:
        source: extractions of the frozen detector: the live one, or a cache, which must hold every view of every image
            of ``ground_truth``.
        ground_truth: the annotation.
        views: how many views of every image to use (:class:`View`).

    Raises:
        DataError: an image is not in the cache.
    """

    def __init__(self, source: ViewSource, ground_truth: GroundTruth, *, views: int = 1):
        self.source, self.ground_truth = source, ground_truth
        self._rows = ground_truth.by_image()
        self.items: list[tuple[Image, int]] = []
        for view in range(views):
            missing = source.missing(ground_truth.images, view=view)
            if missing:
                raise DataError(
                    f"{len(missing)} of {len(ground_truth.images)} images are not in the feature cache "
                    f"(first: image {missing[0].id}). Fill it first with CachedFeatures.fill."
                )
            self.items += [(image, view) for image in ground_truth.images]
        to_category = source.adapter.category_ids
        known = [category.id for category in ground_truth.categories]
        self._label_of = {c: label for label, c in (to_category or {c: c for c in known}).items() if c in known}

    def __len__(self) -> int:
        """Number of images, times views."""
        return len(self.items)

    @property
    def labels(self) -> tuple[int, ...]:
        """The detector's labels that the annotation covers, ascending."""
        return tuple(sorted(self._label_of.values()))

    def load(self, index: int) -> tuple[Extraction, Targets]:
        """The extraction of one view, and its annotation. Candidates of classes that are not annotated are dropped."""
        image, view = self.items[index]
        return self._joined(image, view, self.source.load(image, view=view))

    def stream(self, indices: Sequence[int]) -> Iterator[tuple[Extraction, Targets]]:
        """:meth:`load` for many indices, in their order, with work done ahead."""
        items = [self.items[index] for index in indices]
        for (image, view), extraction in zip(items, self.source.stream(items), strict=True):
            yield self._joined(image, view, extraction)

    def _joined(self, image: Image, view: int, extraction: Extraction) -> tuple[Extraction, Targets]:
        candidates = extraction.candidates.to("cpu")
        annotated = torch.isin(candidates.labels, torch.tensor(self.labels, dtype=torch.int64))
        candidates = candidates[annotated]
        clipped = clip_boxes(candidates.boxes, extraction.features.image_sizes[0])  # as the stage does
        extraction = Extraction(image.id, extraction.features, candidates.replace(boxes=clipped), extraction.transform)
        return extraction, self._targets(image, extraction, view)

    def _targets(self, image: Image, extraction: Extraction, number: int) -> Targets:
        rows = self._rows.get(image.id, np.zeros(0, np.int64))
        rows = rows[np.isin(self.ground_truth.category_id[rows], list(self._label_of))]
        boxes = torch.from_numpy(xywh_to_xyxy(self.ground_truth.bbox[rows])).float().reshape(-1, 4)
        labels = torch.tensor([self._label_of[int(c)] for c in self.ground_truth.category_id[rows]], dtype=torch.int64)
        ignored = torch.from_numpy(np.asarray(self.ground_truth.iscrowd[rows], dtype=bool))
        view = View.of(image.id, (image.height, image.width), number)
        whole = view.boxes(boxes)
        visible = clip_boxes(whole, (view.height, view.width)) if number else whole
        ignored |= box_area(visible) < _LEAST_VISIBLE * box_area(whole)
        boxes = extraction.transform.to_network(visible)
        valid = valid_boxes(boxes)
        gt, rest = ~ignored & valid, ignored & valid
        return Targets(boxes[gt], labels[gt], boxes[rest], labels[rest])


def sample_boxes(
    extraction: Extraction,
    targets: Targets,
    count: int,
    *,
    candidate_share: float,
    jitter_min_iou: float,
    generator: torch.Generator,
) -> Samples:
    """Sample training boxes of one image: jittered objects and the detector's candidates, each even in IoU.

    Args:
        extraction: with the candidates.
        targets: the annotation of the image.
        count: number of boxes; fewer come where there are neither objects nor candidates.
        candidate_share: share of them that are candidates.
        jitter_min_iou: lowest IoU of the jittered boxes.
        generator: source of randomness.
    """
    candidates = extraction.candidates
    iou = targets.true_iou(candidates.boxes, candidates.labels)
    judged = torch.nonzero(torch.isfinite(iou) & valid_boxes(candidates.boxes)).flatten()
    share = round(count * candidate_share) if len(targets.gt_boxes) else count
    chosen = judged[_even_in_iou(iou[judged], min(share, len(judged)), generator)]
    boxes, labels = [candidates.boxes[chosen]], [candidates.labels[chosen]]
    if len(targets.gt_boxes):
        rows = torch.arange(count - len(chosen)) % len(targets.gt_boxes)
        jittered, _ = jitter_boxes(targets.gt_boxes[rows], 1, low=jitter_min_iou, generator=generator)
        jittered = clip_boxes(jittered[:, 0], extraction.features.image_sizes[0])
        inside = valid_boxes(jittered)
        boxes.append(jittered[inside])
        labels.append(targets.gt_labels[rows][inside])
    all_boxes, all_labels = torch.cat(boxes), torch.cat(labels)
    # Matched again: a jittered box may fit a neighbour better than the object it came from, and clipping to the image
    # changes its IoU.
    iou, gt_boxes = targets.match(all_boxes, all_labels)
    judged = torch.nonzero(torch.isfinite(iou)).flatten()
    return Samples(all_boxes, all_labels, iou, gt_boxes)[judged]


def _even_in_iou(iou: Tensor, count: int, generator: torch.Generator, *, bins: int = 10) -> Tensor:
    """``count`` distinct rows drawn so that all tenths of IoU that occur come up about equally often."""
    stratum = (iou * bins).long().clamp(0, bins - 1)
    weight = 1 / torch.bincount(stratum, minlength=bins).float()[stratum]
    # Exponential races: the smallest Exp(1) / weight win, which is sampling without replacement by weight.
    race = torch.empty(len(iou)).exponential_(generator=generator) / weight
    return race.argsort()[:count]


def collate(samples: Sequence[Samples]) -> tuple[Samples, Tensor]:
    """Samples of several images in one, and the image of each (R,) int64."""
    image_index = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s) for s in samples]))
    columns = {f.name: torch.cat([getattr(s, f.name) for s in samples]) for f in fields(Samples)}
    return Samples(**columns), image_index
