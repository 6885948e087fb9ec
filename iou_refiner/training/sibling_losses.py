"""The losses of a network over siblings: of the deltas, of the IoU, and of the share that the detection score is.

What is true of a detection depends on where its box comes to lie and which detections stand before it. So the boxes are
moved and ordered as the network would have it at this moment, and the truth of IoU and share is that of the moved
boxes; no gradient goes through either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iou_refiner.boxes import decode_boxes
from iou_refiner.siblings.sibling_net import Verdict
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.losses import smooth_l1_of_deltas
from iou_refiner.training.shares import true_positives

_DELTAS_IOU = 0.5  # true IoU of a survivor from which on its box has deltas to learn
_POSITIVE_IOU = 0.3  # true IoU of a moved box above which it has an IoU to learn
_DELTAS_WEIGHT, _IOU_WEIGHT, _SHARE_WEIGHT = 0.5, 0.5, 0.4


def sibling_loss(verdict: Verdict, samples: ClusterSamples) -> Tensor:
    """The sum of the three losses, a scalar.

    Args:
        verdict: on the survivors of ``samples``.
        samples: the clusters and the annotation of some images.
    """
    rows = samples.clusters.survivors.cpu()
    boxes, labels = samples.boxes.cpu()[rows], samples.labels.cpu()[rows]
    moved = decode_boxes(verdict.deltas.detach().cpu(), boxes)
    scores, counts = verdict.scores.detach().cpu(), list(samples.survivors)
    truth = [
        (*targets.match(start, label), targets.true_iou(box, label), true_positives(box, score, label, targets))
        for start, box, score, label, targets in zip(
            *(column.split(counts) for column in (boxes, moved, scores, labels)), samples.targets, strict=True
        )
    ]
    columns = (torch.cat(column).to(verdict.deltas.device) for column in zip(*truth, strict=True))
    iou, gt_boxes, moved_iou, positive = columns
    objects = max(sum(len(targets.gt_boxes) for targets in samples.targets), 1)
    return (
        _DELTAS_WEIGHT * deltas_loss(verdict.deltas, boxes.to(gt_boxes), gt_boxes, iou)
        + _IOU_WEIGHT * iou_loss(verdict.iou_logits, moved_iou)
        + _SHARE_WEIGHT * share_loss(verdict.share_logits, positive) / objects
    )


def deltas_loss(deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, iou: Tensor) -> Tensor:
    """Smooth-L1 on the deltas (Q, 4) from boxes to the objects they fit best, the mean over boxes that mean one."""
    rows = torch.nonzero(iou > _DELTAS_IOU).flatten()
    return smooth_l1_of_deltas(deltas[rows], boxes[rows], gt_boxes[rows])


def iou_loss(logits: Tensor, iou: Tensor) -> Tensor:
    """Cross-entropy of IoU logits (Q,) to the true IoU of the moved boxes, the mean over boxes that mean an object."""
    rows = torch.nonzero(iou > _POSITIVE_IOU).flatten()
    loss = nn.functional.binary_cross_entropy_with_logits(logits[rows], iou[rows], reduction="sum")
    return loss / max(len(rows), 1)


def share_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy of share logits (Q, 10) to what is a true positive, the sum over boxes and thresholds judged."""
    judged = torch.isfinite(positive)
    return nn.functional.binary_cross_entropy_with_logits(logits[judged], positive[judged], reduction="sum")
