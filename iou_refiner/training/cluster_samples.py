"""What a network over siblings is trained on: the clusters of an image, with the annotation of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iou_refiner.boxes import valid_boxes
from iou_refiner.siblings.clusters import Clusters
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.stage.by_siblings import clusters_of_image
from iou_refiner.structures import Detections
from iou_refiner.training.samples import Targets


@dataclass(frozen=True, eq=False)
class ClusterSamples:
    """The candidates of some images, the survivors among them, and what is true of the images.

    Attributes:
        boxes: (N, 4) float32 xyxy candidates, image after image.
        scores: (N,) float32 class scores.
        labels: (N,) int64.
        limits: (N, 4) float32, width and height of the image of each, twice.
        clusters: Q survivors and their siblings.
        survivors: of each image, how many of these are its own.
        targets: of each image.
        embedding: (Q, E) RoI embedding of the survivors, or None where nothing reads features.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    limits: Tensor
    clusters: Clusters
    survivors: tuple[int, ...]
    targets: tuple[Targets, ...]
    embedding: Tensor | None = None

    @classmethod
    def of(cls, candidates: Detections, limit: Tensor, targets: Targets, config: SiblingConfig) -> ClusterSamples:
        """The samples of one image.

        Args:
            candidates: boxes before suppression, in the pixels of ``targets``; those without a size are left out.
            limit: (4,) float32, width and height of the image, twice.
            targets: the annotation of the image.
            config: of the network, for its suppression and bounds.
        """
        candidates = candidates[valid_boxes(candidates.boxes) & torch.isfinite(candidates.scores)]
        boxes, scores, labels = candidates.boxes.float(), candidates.scores.float(), candidates.labels
        clusters = clusters_of_image(boxes, scores, labels, config)
        return cls(boxes, scores, labels, limit.expand(len(boxes), 4), clusters, (len(clusters),), (targets,))

    @classmethod
    def concat(cls, parts: Sequence[ClusterSamples]) -> ClusterSamples:
        """The samples of several images in one; at least one, all with embeddings or none."""
        columns = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels", "limits")
        }
        embeddings = [part.embedding for part in parts if part.embedding is not None]
        return cls(
            **columns,
            clusters=Clusters.concat([part.clusters for part in parts], [len(part.boxes) for part in parts]),
            survivors=tuple(count for part in parts for count in part.survivors),
            targets=tuple(targets for part in parts for targets in part.targets),
            embedding=torch.cat(embeddings) if embeddings else None,
        )

    def to(self, device: torch.device) -> ClusterSamples:
        """The same on another device, but for the annotation, which stays on the CPU."""
        columns = {name: getattr(self, name).to(device) for name in ("boxes", "scores", "labels", "limits")}
        embedding = None if self.embedding is None else self.embedding.to(device)
        return replace(self, **columns, clusters=self.clusters.to(device), embedding=embedding)

    def mirrored(self) -> ClusterSamples:
        """One image seen in a mirror, left to right. Of its embedding nobody knows what it would be there."""
        seen = tuple(_mirrored_targets(targets, self.limits[:1, 2]) for targets in self.targets)
        boxes = _mirrored(self.boxes, self.limits[:, 2])
        return replace(self, boxes=boxes, targets=seen, embedding=None)

    def thinned(self, share: float, generator: torch.Generator) -> ClusterSamples:
        """The same with this share of the siblings unheard, others each time.

        Which of its fifty boxes a detector says of an object is half chance; a network that has heard others of them
        before does not learn the fifty by heart.
        """
        heard = torch.rand(self.clusters.is_sibling.shape, generator=generator) >= share
        return replace(self, clusters=replace(self.clusters, is_sibling=self.clusters.is_sibling & heard))


def _mirrored(boxes: Tensor, width: Tensor) -> Tensor:
    """Boxes (N, 4) in images of these widths, (N,) or (1,), left to right."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)


def _mirrored_targets(targets: Targets, width: Tensor) -> Targets:
    return replace(
        targets,
        gt_boxes=_mirrored(targets.gt_boxes, width),
        ignored_boxes=_mirrored(targets.ignored_boxes, width),
    )
