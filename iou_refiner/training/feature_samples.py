"""The clusters of a detector's images, with what the trunk of a trained head makes of each survivor."""

from __future__ import annotations

from dataclasses import replace

import torch

from iou_refiner.coco.data import spread_rows
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.progress import Progress, no_progress
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.samples import TrainingSet


@torch.no_grad()
def feature_samples(
    head: IoUHead, train: TrainingSet, config: SiblingConfig, *, most: int, progress: Progress = no_progress
) -> list[ClusterSamples]:
    """The samples of at most ``most`` views of images, spread over all, on the CPU.

    Args:
        head: the trained head, whose RoI embedding the survivors bring; kept in float16.
        train: the views.
        config: of the network over siblings.
        most: bound on the views.
        progress: called after each, in the phase "looking at siblings".
    """
    chosen = spread_rows(len(train), most)
    samples = []
    for done, (extraction, targets) in enumerate(train.stream(chosen), 1):
        height, width = extraction.features.image_sizes[0]
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        image = ClusterSamples.of(extraction.candidates.to("cpu"), limit, targets, config)
        boxes = image.boxes[image.clusters.survivors].to(head.device)
        image_index = torch.zeros(len(boxes), dtype=torch.int64, device=head.device)
        embedding = head.roi_embedding(head.encode(extraction.features), boxes, image_index)
        samples.append(replace(image, embedding=embedding.half().cpu()))
        progress("looking at siblings", done, len(chosen))
    return samples
