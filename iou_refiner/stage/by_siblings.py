"""The other way through the stage: what survives the detector's kind of suppression is judged by its siblings.

A greedy NMS at the threshold that the network was trained with leaves a few boxes for each object. Each is moved, and
scored by the share of IoU thresholds at which it is expected to be a true positive: a second box on an object expects
none, and goes to the end of the list without being suppressed. So the head is asked about the survivors only, a tenth
of the candidates of a dense detector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from iou_refiner.boxes import decode_boxes
from iou_refiner.siblings.clusters import Clusters
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.sibling_net import SiblingNet
from iou_refiner.stage.batch import FlatBatch
from iou_refiner.stage.nms import nms

#: What the head makes of boxes, (R, E).
Embed = Callable[[FlatBatch], Tensor]


def judge_by_siblings(net: SiblingNet, batch: FlatBatch, embed: Embed | None = None, *, move: float = 1.0) -> FlatBatch:
    """The survivors of each image, moved and scored, with their predicted IoU.

    Args:
        net: the network over siblings.
        batch: candidates, finite.
        embed: gives the RoI embedding of boxes; None judges without features.
        move: share of the deltas by which boxes are moved.
    """
    batch = batch.by_score()
    keep = _survivors(net, batch)
    if not len(keep):
        return batch[keep]
    survivors = batch[keep]
    clusters = _clusters(net, batch, keep)
    embedding = None if embed is None else embed(survivors)
    verdict = net(batch.boxes, batch.scores, batch.limits, clusters, embedding)
    moved = survivors.moved_to(decode_boxes(verdict.deltas * move, survivors.boxes)) if move else survivors
    return moved.replace(scores=verdict.scores.to(batch.scores), iou=verdict.iou, ranking=verdict.iou)


def clusters_of_image(boxes: Tensor, scores: Tensor, labels: Tensor, config: SiblingConfig) -> Clusters:
    """The survivors of one image, best scores first, and who is whose sibling; arguments as :meth:`Clusters.of`."""
    keep = nms(boxes, scores, labels, threshold=config.nms_threshold)[: config.most_survivors]
    return Clusters.of(boxes, scores, labels, keep, config)


def _survivors(net: SiblingNet, batch: FlatBatch) -> Tensor:
    """Rows (Q,) of a batch in the order of its scores that a greedy NMS keeps, image by image."""
    keep = nms(batch.boxes, batch.scores, batch.group(), threshold=net.config.nms_threshold).sort().values
    return keep[batch[keep].topk_rows(net.config.most_survivors)]


def _clusters(net: SiblingNet, batch: FlatBatch, keep: Tensor) -> Clusters:
    images = int(batch.image_index[-1]) + 1
    counts = torch.bincount(batch.image_index, minlength=images).tolist()
    rows_of = keep.split(torch.bincount(batch.image_index[keep], minlength=images).tolist())
    parts, first = [], 0
    for count, rows in zip(counts, rows_of, strict=True):
        image = slice(first, first + count)
        boxes, scores, labels = batch.boxes[image], batch.scores[image], batch.labels[image]
        parts.append(Clusters.of(boxes, scores, labels, rows - first, net.config))
        first += count
    return Clusters.concat(parts, counts)
