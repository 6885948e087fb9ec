"""What the head is trained to do.

Three losses share the trunk: the IoU itself; the *order* of the boxes around one object, an energy in the sense of
Gustafsson et al. (ECCV 2020) learned as a distribution over them; and the way to the object. Suppression and ascent
live on the order, and an IoU that is right on average need not have it.

The IoU is that of a box which means an object. Whether it means one at all is what the class score says, and a head
asked both learns mostly that (docs/accuracy.md, question 2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iou_refiner.boxes import encode_boxes
from iou_refiner.head.iou_head import WAY_SPREAD, IoUPredictor
from iou_refiner.training.samples import Samples

_MEANS_OBJECT = 0.3  # true IoU above which a box is taken to mean the object: it has a fit, and a way to go
_ORDERED = 0.1  # true IoU above which a box takes part in the order around its object
_ORDER_TEMPERATURE = 0.1  # difference of IoU that makes a box e times as likely to be the one
ORDER_WEIGHT = 2.0


def total_loss(head: IoUPredictor, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """The losses of all outputs the head has.

    Args:
        head: for its outputs and its objective.
        read: (R, hidden[-1]), what the trunk made of the boxes.
        asked: the R boxes and their truth.
        image_index: (R,) the image of each.
    """
    meant = torch.nonzero(asked.iou > _MEANS_OBJECT).flatten()
    loss = fit_loss(head, head.fit_of(read[meant], asked.labels[meant]), asked.iou[meant])
    if head.order:
        loss = loss + ORDER_WEIGHT * order_loss(head.energy_of(read), asked, image_index)
    if head.regress:
        loss = loss + way_loss(head.way_of(read), asked)
    return loss


def fit_loss(head: IoUPredictor, raw: Tensor, iou: Tensor) -> Tensor:
    """Of the raw output (R,) to the true IoU (R,), by the head's objective. The mean over boxes."""
    if head.objective == "bce":
        loss = nn.functional.binary_cross_entropy_with_logits(raw, iou, reduction="sum")
    else:
        loss = nn.functional.smooth_l1_loss(raw, 2 * iou - 1, reduction="sum")
    return loss / max(len(iou), 1)


def order_loss(energy: Tensor, asked: Samples, image_index: Tensor, worth: Tensor | None = None) -> Tensor:
    """Divergence from a distribution over the boxes that mean one object, ``exp(worth)``, to that of the energies:
    which of them fits best, whatever the object. The mean over objects.

    Args:
        energy: (R,).
        asked: the R boxes and their truth.
        image_index: (R,) the image of each.
        worth: (R,) of each box; default its IoU over a temperature.
    """
    rows = torch.nonzero(asked.iou > _ORDERED).flatten()
    if not len(rows):
        return energy.sum() * 0
    key = torch.cat([image_index[rows, None].to(asked.objects), asked.objects[rows]], 1)
    group = torch.unique(key, dim=0, return_inverse=True)[1]
    wanted = _log_softmax((asked.iou / _ORDER_TEMPERATURE if worth is None else worth)[rows], group)
    divergence: Tensor = (wanted.exp() * (wanted - _log_softmax(energy[rows], group))).sum()
    return divergence / (int(group.max()) + 1)


def _log_softmax(values: Tensor, group: Tensor) -> Tensor:
    """Log-softmax of values (R,) within each group (R,), numbered from 0."""
    groups = int(group.max()) + 1
    highest = values.new_full((groups,), -torch.inf).scatter_reduce(0, group, values.detach(), "amax")
    values = values - highest[group]
    total: Tensor = values.new_zeros(groups).index_add(0, group, values.exp())
    return values - total.log()[group]


def way_loss(way: Tensor, asked: Samples) -> Tensor:
    """Smooth-L1 on the way to the object, over the boxes that mean one: a box beside everything has nowhere to go."""
    rows = torch.nonzero(asked.iou > _MEANS_OBJECT).flatten()
    wanted = encode_boxes(asked.objects[rows], asked.boxes[rows])
    error = (way[rows] - wanted) / way.new_tensor(WAY_SPREAD)
    loss = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5, reduction="sum")
    return loss / max(len(rows), 1)
