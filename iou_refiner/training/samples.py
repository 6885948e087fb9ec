"""What the head is trained on and measured against: boxes of an image with their true IoU.

Two sources are mixed. *Jittered ground truth* covers all IoU evenly, as in the paper. *The detector's own candidates*
are the boxes the head will be asked about; among them those below IoU 0.5 count too, since a head that never saw them
believes that everything fits. Crowd regions say nothing about how well a single box fits: candidates in them are left
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from iou_refiner.boxes import box_area, clip_boxes, pairwise_iou, valid_boxes
from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Image, xywh_to_xyxy
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.detector.views import View
from iou_refiner.training.jitter import jitter_boxes

# A candidate more than this far inside a crowd region, and fitting no single object, is not judged.
_CROWD_COVER = 0.5
# Share of an object that a view must show for its box to be one to learn from.
_LEAST_VISIBLE = 0.25


@dataclass(frozen=True, eq=False)
class Objects:
    """The annotated objects of one image, network frame.

    Attributes:
        boxes: (G, 4) float32 xyxy.
        labels: (G,) int64, the detector's class numbers.
        crowds: (K, 4) float32 xyxy, regions in which single objects are not annotated.
    """

    boxes: Tensor
    labels: Tensor
    crowds: Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Boxes of one image with their truth.

    Attributes:
        boxes: (R, 4) float32 xyxy, network frame.
        labels: (R,) int64.
        iou: (R,) float32, IoU with the best object of the same class.
        objects: (R, 4) float32 xyxy, that object; the box itself where the image has none.
    """

    boxes: Tensor
    labels: Tensor
    iou: Tensor
    objects: Tensor

    def __getitem__(self, rows: Tensor) -> Samples:
        """The samples of these rows."""
        return Samples(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device) -> Samples:
        """The same on another device."""
        return Samples(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class TrainingSet:
    """Cached extractions joined with their annotation.

    Args:
        cache: extractions of the frozen detector; must hold every image of ``ground_truth``.
        ground_truth: the annotation.
        views: how many views of every image to use (:class:`View`; all must be in the cache).

    Raises:
        DataError: an image is not in the cache.
    """

    def __init__(self, cache: FeatureCache, ground_truth: GroundTruth, *, views: int = 1):
        self.cache, self.ground_truth = cache, ground_truth
        self._rows = ground_truth.by_image()
        self.items: list[tuple[Image, int]] = []
        for view in range(views):
            missing = cache.missing(ground_truth.images, view=view)
            if missing:
                raise DataError(
                    f"{len(missing)} of {len(ground_truth.images)} images are not in the feature cache "
                    f"(first: image {missing[0].id}). Fill it first with FeatureCache.fill."
                )
            self.items += [(image, view) for image in ground_truth.images]
        to_category = cache.adapter.category_ids
        known = [category.id for category in ground_truth.categories]
        self._label_of = {c: label for label, c in (to_category or {c: c for c in known}).items() if c in known}

    def __len__(self) -> int:
        """Number of images, times views."""
        return len(self.items)

    @property
    def labels(self) -> tuple[int, ...]:
        """The detector's labels that the annotation covers, ascending."""
        return tuple(sorted(self._label_of.values()))

    def load(self, index: int) -> tuple[Extraction, Objects]:
        """What the detector saw in one image, and what is there. Candidates of classes not annotated are dropped."""
        image, view = self.items[index]
        extraction = self.cache.load(image.id, view=view)
        found = extraction.candidates
        annotated = torch.isin(found.labels, torch.tensor(self.labels, dtype=torch.int64))
        found = found[annotated]
        found = found.replace(boxes=clip_boxes(found.boxes, extraction.features.image_sizes[0]))  # as the stage does
        extraction = Extraction(image.id, extraction.features, found, extraction.frame)
        return extraction, self._objects(image, extraction, view)

    def _objects(self, image: Image, extraction: Extraction, number: int) -> Objects:
        rows = self._rows.get(image.id, np.zeros(0, np.int64))
        rows = rows[np.isin(self.ground_truth.category_id[rows], list(self._label_of))]
        boxes = torch.from_numpy(xywh_to_xyxy(self.ground_truth.bbox[rows])).float().reshape(-1, 4)
        labels = torch.tensor([self._label_of[int(c)] for c in self.ground_truth.category_id[rows]], dtype=torch.int64)
        crowd = torch.from_numpy(np.asarray(self.ground_truth.iscrowd[rows], dtype=bool))
        view = View.of(image.id, (image.height, image.width), number)
        whole = view.boxes(boxes)
        seen = clip_boxes(whole, (view.height, view.width)) if number else whole
        # Of an object that is mostly outside the view nobody can say where it ends: not judged, like a crowd.
        crowd |= box_area(seen) < _LEAST_VISIBLE * box_area(whole)
        boxes = extraction.frame.to_network(seen)
        valid = valid_boxes(boxes)
        return Objects(boxes[~crowd & valid], labels[~crowd & valid], boxes[crowd & valid])


def true_iou(boxes: Tensor, labels: Tensor, objects: Objects) -> Tensor:
    """IoU (R,) of each box with the best object of its class; NaN where a crowd region makes it unknowable."""
    if len(objects.boxes):
        iou = pairwise_iou(boxes, objects.boxes) * (labels[:, None] == objects.labels)
        best = iou.amax(1)
    else:
        best = boxes.new_zeros(len(boxes))
    if len(objects.crowds) and len(boxes):
        top_left = torch.maximum(boxes[:, None, :2], objects.crowds[:, :2])
        bottom_right = torch.minimum(boxes[:, None, 2:], objects.crowds[:, 2:])
        cover = (bottom_right - top_left).clamp(min=0).prod(-1).amax(1) / box_area(boxes).clamp(min=1e-6)
        best = torch.where((best < 0.5) & (cover > _CROWD_COVER), torch.nan, best)
    return best


def sample_boxes(
    extraction: Extraction,
    objects: Objects,
    count: int,
    *,
    candidate_share: float,
    lowest_iou: float,
    generator: torch.Generator,
) -> Samples:
    """Draw training boxes for one image: jittered objects and the detector's candidates, each even in IoU.

    Args:
        extraction: with the candidates.
        objects: of the image.
        count: boxes wanted; fewer come where there are neither objects nor candidates.
        candidate_share: share of them that are candidates.
        lowest_iou: low end of the jitter.
        generator: source of randomness.
    """
    found = extraction.candidates
    iou = true_iou(found.boxes, found.labels, objects)
    judged = torch.nonzero(torch.isfinite(iou) & valid_boxes(found.boxes)).flatten()
    wanted = round(count * candidate_share) if len(objects.boxes) else count
    chosen = judged[_even_in(iou[judged], min(wanted, len(judged)), generator)]
    boxes, labels = [found.boxes[chosen]], [found.labels[chosen]]
    if len(objects.boxes):
        rest = count - len(chosen)
        which = torch.arange(rest) % len(objects.boxes)
        moved, _ = jitter_boxes(objects.boxes[which], 1, low=lowest_iou, generator=generator)
        moved = clip_boxes(moved[:, 0], extraction.features.image_sizes[0])
        inside = valid_boxes(moved)
        boxes.append(moved[inside])
        labels.append(objects.labels[which][inside])
    all_boxes, all_labels = torch.cat(boxes), torch.cat(labels)
    # Asked again for every box: a jittered box may fit a neighbour better than the object it came from, and clipping
    # to the image changes its IoU.
    iou = true_iou(all_boxes, all_labels, objects)
    judged = torch.nonzero(torch.isfinite(iou)).flatten()
    return Samples(all_boxes, all_labels, iou, best_object(all_boxes, all_labels, objects))[judged]


def best_object(boxes: Tensor, labels: Tensor, objects: Objects) -> Tensor:
    """The object (R, 4) of its class that each box fits best; the box itself where the image has none."""
    if not len(objects.boxes):
        return boxes
    iou = pairwise_iou(boxes, objects.boxes) * (labels[:, None] == objects.labels)
    return objects.boxes[iou.argmax(1)]


def _even_in(iou: Tensor, count: int, generator: torch.Generator, *, bins: int = 10) -> Tensor:
    """``count`` distinct rows drawn so that all tenths of IoU that occur come up about equally often."""
    stratum = (iou * bins).long().clamp(0, bins - 1)
    weight = 1 / torch.bincount(stratum, minlength=bins).float()[stratum]
    # Exponential races: the smallest Exp(1) / weight win, which is sampling without replacement by weight.
    race = torch.empty(len(iou)).exponential_(generator=generator) / weight
    return race.argsort()[:count]


def collate(samples: Sequence[Samples]) -> tuple[Samples, Tensor]:
    """Samples of several images in one, and the image of each (R,) int64."""
    image_index = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s.iou) for s in samples]))
    columns = {f.name: torch.cat([getattr(s, f.name) for s in samples]) for f in fields(Samples)}
    return Samples(**columns), image_index
