"""Question 2: what the head is asked to learn.

The default trains three losses on one trunk (:mod:`iou_refiner.losses`): the IoU, the order of the boxes around one
object, the way to the object. Here each is left out or exchanged.
"""

from __future__ import annotations

from typing import Any

from lab import Variant, ask
from torch import Tensor, nn

from iou_refiner import losses
from iou_refiner.predictor import IoUPredictor
from iou_refiner.targets import Samples


def without_order(head: IoUPredictor, order: nn.Linear, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """The IoU and the way alone."""
    loss = losses.fit_loss(head, head.fit_of(read, asked.labels), asked.iou)
    return loss + losses.way_loss(head.way_of(read), asked) if head.regress else loss


def order_by_iou(head: IoUPredictor, order: nn.Linear, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """The order asked of the IoU's own logit instead of an energy beside it; wanted: odds of the true IoU."""
    raw = head.fit_of(read, asked.labels)
    odds = asked.iou.clamp(0.01, 0.99).logit()
    loss = losses.fit_loss(head, raw, asked.iou) + losses.way_loss(head.way_of(read), asked)
    return loss + losses.ORDER_WEIGHT * losses.order_loss(raw, asked, image_index, odds)


def energy_alone(head: IoUPredictor, order: nn.Linear, read: Tensor, asked: Samples, image_index: Tensor) -> Tensor:
    """One output for ranking and ascent, an energy learned as a distribution over the boxes around one object, without
    a unit; its sigmoid stands where an IoU would. The divergence is that of Gustafsson et al., 2020."""
    energy = head.fit_of(read, asked.labels)
    return losses.order_loss(energy, asked, image_index) + losses.way_loss(head.way_of(read), asked)


def _with(loss: Any) -> Any:
    return lambda head: {"loss": loss}


VARIANTS = {
    "default: BCE on the IoU, order, way": Variant(),
    "smooth-L1 on the IoU, order, way": Variant(head={"objective": "smooth_l1"}),
    "BCE, way": Variant(prepare=_with(without_order)),
    "BCE alone": Variant(head={"regress": False}, prepare=_with(without_order)),
    "smooth-L1 alone, the paper's": Variant(
        head={"regress": False, "objective": "smooth_l1"}, prepare=_with(without_order)
    ),
    "BCE, order of the IoU itself, way": Variant(prepare=_with(order_by_iou)),
    "energy, way; no IoU": Variant(prepare=_with(energy_alone)),
}

if __name__ == "__main__":
    ask("objective", VARIANTS, __doc__)
