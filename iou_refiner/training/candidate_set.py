"""Saved candidates joined with their annotation: what a network over siblings learns from without any detector.

A results file says nothing of the images' sizes, and the one that will be rescored comes without an annotation. So
here, and then, an image reaches as far as the candidates in it do.
"""

from __future__ import annotations

import numpy as np
import torch

from iou_refiner.boxes import valid_boxes
from iou_refiner.coco import GroundTruth, Results, xywh_to_xyxy
from iou_refiner.coco.data import IntArray, spread_rows
from iou_refiner.rescoring import saved_candidates
from iou_refiner.rescoring.records import check_known
from iou_refiner.siblings.clusters import reach
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.samples import Targets


def candidate_samples(
    results: Results, ground_truth: GroundTruth, config: SiblingConfig, *, most: int
) -> list[ClusterSamples]:
    """The clusters of the images of a results file, of at most ``most`` of them, spread over all.

    Args:
        results: candidates before suppression; categories are those of the annotation.
        ground_truth: the annotation.
        config: of the network.
        most: bound on the images.

    Raises:
        DataError: a record is of an image that the annotation does not have.
    """
    check_known("image", results.image_id, (image.id for image in ground_truth.images))
    images = list(results.by_image().items())
    gt_rows = ground_truth.by_image()
    samples = []
    for row in spread_rows(len(images), most):
        image, rows = images[row]
        candidates = saved_candidates(results[rows])
        limit = reach(candidates.boxes)
        annotated = torch.isin(candidates.labels, torch.tensor([category.id for category in ground_truth.categories]))
        samples.append(ClusterSamples.of(candidates[annotated], limit, _targets(ground_truth, gt_rows[image]), config))
    return samples


def _targets(ground_truth: GroundTruth, rows: IntArray) -> Targets:
    """The annotation of an image, in its own pixels; the category id is the label."""
    boxes = torch.from_numpy(xywh_to_xyxy(ground_truth.bbox[rows])).float().reshape(-1, 4)
    labels = torch.from_numpy(ground_truth.category_id[rows])
    ignored = torch.from_numpy(np.asarray(ground_truth.iscrowd[rows], dtype=bool))
    gt, rest = ~ignored & valid_boxes(boxes), ignored & valid_boxes(boxes)
    return Targets(boxes[gt], labels[gt], boxes[rest], labels[rest])
