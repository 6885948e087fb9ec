"""The losses of the head.

Three losses share the trunk: the IoU itself; the *ranking* of the boxes around one object, an energy in the sense of
Gustafsson et al. (ECCV 2020), learned as a distribution over these boxes; and the deltas to the object. Suppression and
ascent depend on the ranking, and an IoU that is right on average need not have it.

The IoU is that of a box with an object it means. Whether it means one at all is what the class score says, and a head
that has to learn both learns mostly that (docs/accuracy.md, ablation 2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iou_refiner.boxes import DELTA_STDS, encode_boxes
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.training.samples import Samples

_POSITIVE_IOU = 0.3  # true IoU above which a box is taken to mean the object: it has an IoU and deltas to learn
_RANKED_IOU = 0.1  # true IoU above which a box takes part in the ranking around its object
_RANKING_TEMPERATURE = 0.1  # difference of IoU that makes a box e times as likely to be the best
RANKING_WEIGHT = 2.0


def total_loss(head: IoUHead, embedding: Tensor, samples: Samples, image_index: Tensor) -> Tensor:
    """The sum of :func:`losses_by_output`."""
    first, *others = losses_by_output(head, embedding, samples, image_index).values()
    return sum(others, first)


def losses_by_output(head: IoUHead, embedding: Tensor, samples: Samples, image_index: Tensor) -> dict[str, Tensor]:
    """The losses of all outputs that the head has, weighted: ``iou``, and perhaps ``ranking`` and ``deltas``.

    Args:
        head: for its outputs and its objective.
        embedding: (R, hidden[-1]), what the trunk made of the boxes.
        samples: the R boxes and their truth.
        image_index: (R,) the image of each.
    """
    positive = torch.nonzero(samples.iou > _POSITIVE_IOU).flatten()
    logits = head.iou_logits(embedding[positive], samples.labels[positive])
    losses = {"iou": iou_loss(head, logits, samples.iou[positive])}
    if head.config.ranking:
        ranking = head.ranking_logits(embedding, samples.labels)
        losses["ranking"] = RANKING_WEIGHT * ranking_loss(ranking, samples, image_index)
    if head.config.deltas:
        losses["deltas"] = deltas_loss(head.deltas(embedding, samples.labels), samples)
    return losses


def iou_loss(head: IoUHead, logits: Tensor, iou: Tensor) -> Tensor:
    """Of IoU logits (R,) to the true IoU (R,), by the head's objective. The mean over boxes."""
    if head.config.objective == "bce":
        loss = nn.functional.binary_cross_entropy_with_logits(logits, iou, reduction="sum")
    else:
        loss = nn.functional.smooth_l1_loss(logits, 2 * iou - 1, reduction="sum")
    return loss / max(len(iou), 1)


def ranking_loss(logits: Tensor, samples: Samples, image_index: Tensor, target_logits: Tensor | None = None) -> Tensor:
    """Divergence of the distribution that the logits give over the boxes of one object from the target distribution:
    which of them fits best, whatever the object. The mean over objects.

    Args:
        logits: (R,) ranking logits.
        samples: the R boxes and their truth.
        image_index: (R,) the image of each.
        target_logits: (R,) of the target distribution; default the true IoU over a temperature.
    """
    rows = torch.nonzero(samples.iou > _RANKED_IOU).flatten()
    if not len(rows):
        return logits.sum() * 0
    key = torch.cat([image_index[rows, None].to(samples.gt_boxes), samples.gt_boxes[rows]], 1)
    group = torch.unique(key, dim=0, return_inverse=True)[1]
    target = _log_softmax((samples.iou / _RANKING_TEMPERATURE if target_logits is None else target_logits)[rows], group)
    divergence: Tensor = (target.exp() * (target - _log_softmax(logits[rows], group))).sum()
    return divergence / (int(group.max()) + 1)


def _log_softmax(values: Tensor, group: Tensor) -> Tensor:
    """Log-softmax of values (R,) within each group (R,), numbered from 0."""
    groups = int(group.max()) + 1
    highest = values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values.detach(), "amax")
    values = values - highest[group]
    total: Tensor = values.new_zeros(groups).index_add(0, group, values.exp())
    return values - total.log()[group]


def deltas_loss(deltas: Tensor, samples: Samples) -> Tensor:
    """Smooth-L1 on the deltas to the object, over the boxes that mean one: the others have no target."""
    rows = torch.nonzero(samples.iou > _POSITIVE_IOU).flatten()
    return smooth_l1_of_deltas(deltas[rows], samples.boxes[rows], samples.gt_boxes[rows])


def smooth_l1_of_deltas(deltas: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """Smooth-L1 on the deltas (R, 4) from boxes (R, 4) to objects (R, 4), the mean over boxes."""
    error = (deltas - encode_boxes(gt_boxes, boxes)) / deltas.new_tensor(DELTA_STDS)
    loss = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5, reduction="sum")
    return loss / max(len(deltas), 1)
