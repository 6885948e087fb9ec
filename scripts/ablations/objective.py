"""Question 2: what the head is asked to learn, and which of its outputs ranks and climbs.

The default trains three losses on one trunk (:mod:`iou_refiner.training.losses`): the IoU, the order of the boxes around one
object, the way to the object. Here each is left out or exchanged.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.training import losses
from iou_refiner.training.samples import Samples
from scripts.ablations.harness import ByIoU, Variant, ask


def iou_of_all(head: IoUPredictor, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """The IoU also of boxes that mean no object."""
    loss = losses.fit_loss(head, head.fit_of(read, asked.labels), asked.iou) + losses.way_loss(head.way_of(read), asked)
    return loss + losses.ORDER_WEIGHT * losses.order_loss(head.energy_of(read), asked, image_index)


def order_by_iou(head: IoUPredictor, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """The order asked of the IoU's own logit instead of an energy beside it; wanted: odds of the true IoU."""
    odds = asked.iou.clamp(0.01, 0.99).logit()
    order = losses.order_loss(head.fit_of(read, asked.labels), asked, image_index, odds)
    return losses.total_loss(head, read, asked, image_index) + losses.ORDER_WEIGHT * order


def without_iou(head: IoUPredictor, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """The energy and the way. The divergence is that of Gustafsson et al., 2020."""
    order = losses.order_loss(head.energy_of(read), asked, image_index)
    return losses.ORDER_WEIGHT * order + losses.way_loss(head.way_of(read), asked)


def _with(loss: Any) -> Any:
    return lambda head: {"loss": loss}


_ALONE = {"order": False, "regress": False}
VARIANTS = {
    "default: IoU by BCE, order, way": Variant(),
    "the same, ranked and climbed by the IoU": Variant(make=ByIoU),
    "the IoU of all boxes": Variant(prepare=_with(iou_of_all)),
    "smooth-L1 on the IoU": Variant(head={"objective": "smooth_l1"}),
    "no order": Variant(head={"order": False}),
    "order of the IoU itself": Variant(head={"order": False}, prepare=_with(order_by_iou)),
    "order and way, no IoU": Variant(prepare=_with(without_iou)),
    "BCE alone": Variant(head=_ALONE),
    "smooth-L1 alone, the paper's": Variant(head=_ALONE | {"objective": "smooth_l1"}),
}

if __name__ == "__main__":
    ask("objective", VARIANTS, __doc__)
