"""Ablation 2: what the head learns, and which of its outputs ranks and is climbed.

The default trains three losses on one trunk (:mod:`iou_refiner.training.losses`): the IoU, the ranking of the boxes
around one object, and the deltas to the object. Here each is left out or exchanged.
"""

from __future__ import annotations

from torch import Tensor

from iou_refiner.head.iou_head import IoUHead
from iou_refiner.training import losses
from iou_refiner.training.samples import Samples
from scripts.ablations.harness import run_training_ablation
from scripts.ablations.variant import Variant


def iou_of_all(head: IoUHead, embedding: Tensor, samples: Samples, image_index: Tensor) -> Tensor:
    """The IoU also of boxes that mean no object."""
    iou = losses.iou_loss(head, head.iou_logits(embedding, samples.labels), samples.iou)
    ranking = losses.ranking_loss(head.ranking_logits(embedding, samples.labels), samples, image_index)
    return iou + losses.deltas_loss(head.deltas(embedding, samples.labels), samples) + losses.RANKING_WEIGHT * ranking


def ranking_of_iou(head: IoUHead, embedding: Tensor, samples: Samples, image_index: Tensor) -> Tensor:
    """The ranking loss on the IoU's own logits, not on an output beside them. Its target: the odds of the true IoU."""
    target = samples.iou.clamp(0.01, 0.99).logit()
    ranking = losses.ranking_loss(head.iou_logits(embedding, samples.labels), samples, image_index, target)
    return losses.total_loss(head, embedding, samples, image_index) + losses.RANKING_WEIGHT * ranking


def without_iou(head: IoUHead, embedding: Tensor, samples: Samples, image_index: Tensor) -> Tensor:
    """The ranking and the deltas. The divergence is that of Gustafsson et al., 2020."""
    ranking = losses.ranking_loss(head.ranking_logits(embedding, samples.labels), samples, image_index)
    return losses.RANKING_WEIGHT * ranking + losses.deltas_loss(head.deltas(embedding, samples.labels), samples)


_IOU_ALONE = {"ranking": False, "deltas": False}
VARIANTS = {
    "default: IoU by BCE, ranking, deltas": Variant(),
    "the same, ranked and climbed by the IoU": Variant(stage={"rank_by": "iou"}),
    "the IoU of all boxes": Variant(loss=iou_of_all),
    "smooth-L1 on the IoU": Variant(head={"objective": "smooth_l1"}),
    "no ranking": Variant(head={"ranking": False}),
    "ranking loss on the IoU itself": Variant(head={"ranking": False}, loss=ranking_of_iou),
    "ranking and deltas, no IoU": Variant(loss=without_iou),
    "BCE alone": Variant(head=_IOU_ALONE),
    "smooth-L1 alone, the paper's": Variant(head=_IOU_ALONE | {"objective": "smooth_l1"}),
}

if __name__ == "__main__":
    run_training_ablation("objective", VARIANTS, __doc__)
