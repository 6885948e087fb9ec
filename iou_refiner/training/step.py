"""One step of training on a batch of images, each of which belongs to one of the processes.

The trunk works image by image, in the process that has the image. The loss is that of the whole batch: every process
gets the embeddings and the truth of all boxes, which is little, and computes all of it, so that the denominators are
right and a loss may compare any boxes. Its gradient goes back through the trunk image by image, and the gradients of
the images are added in the order of the batch. So the sum, and with it every weight, is the same to the last bit for
any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from iou_refiner.checks import DataError
from iou_refiner.detector.features import Extraction
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.parallel.ranks import current
from iou_refiner.training.samples import Samples, collate

#: (head, embedding of R boxes, the boxes and their truth, image of each) to a loss.
Loss = Callable[[IoUHead, Tensor, Samples, Tensor], Tensor]


def train_step(
    head: IoUHead,
    extractions: Sequence[Extraction],
    samples: Sequence[Samples],
    image_ids: Sequence[int],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
) -> tuple[float, int]:
    """One step; the same head comes out in every process.

    Args:
        head: to be trained.
        extractions, samples: of this process's images of the batch.
        image_ids: of all images of the batch, in order.
        loss: of all their boxes.
        optimizer: of the head.

    Returns:
        The loss and the number of boxes of the whole batch. Without boxes there is no step.

    Raises:
        DataError: the loss is not finite.
    """
    ranks, total = current(), len(image_ids)
    embeddings = [_embedding(head, *each) for each in zip(extractions, samples, strict=True)]
    packed = ranks.share([each.packed() for each in samples], total, torch.zeros(0, 10, dtype=torch.float64))
    batch, image_index = collate([Samples.unpacked(rows) for rows in packed])
    leaf = torch.cat(ranks.share([each.detach() for each in embeddings], total, _no_embedding(head))).requires_grad_()
    value = loss(head, leaf, batch.to(head.device), image_index.to(head.device))
    if not len(batch):
        return value.item(), 0
    if not torch.isfinite(value):
        images = ", ".join(map(str, image_ids))
        raise DataError(f"The loss is {value.item()} on images {images}. Are their features finite?")
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    incoming = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).split([len(rows) for rows in packed])
    _add_gradients(head, embeddings, ranks.mine(incoming), total)
    optimizer.step()
    return value.item(), len(batch)


def _embedding(head: IoUHead, extraction: Extraction, samples: Samples) -> Tensor:
    """What the trunk makes of the boxes of one image, (R, hidden[-1])."""
    boxes = samples.boxes.to(head.device)
    image_index = torch.zeros(len(boxes), dtype=torch.int64, device=head.device)
    return head.roi_embedding(head.encode(extraction.features), boxes, image_index)


def _no_embedding(head: IoUHead) -> Tensor:
    return head.iou_output.weight.new_zeros(0, head.iou_output.in_features)


def _add_gradients(head: IoUHead, embeddings: Sequence[Tensor], incoming: Sequence[Tensor], total: int) -> None:
    """Put what comes back from the loss through the trunk into the gradients of the head, for all ``total`` images."""
    ranks, weights = current(), [weight for weight in head.parameters() if weight.requires_grad]

    def back() -> Iterator[Tensor]:
        for embedding, gradient in zip(embeddings, incoming, strict=True):
            if len(embedding):
                parts = torch.autograd.grad(embedding, weights, gradient, allow_unused=True)
                yield _flat(parts, weights)
            else:
                yield torch.zeros_like(of_loss)

    # Of the loss itself, which all processes have computed alike; on a GPU perhaps not to the last bit.
    of_loss = ranks.from_first(_flat([weight.grad for weight in weights], weights))
    whole = of_loss + ranks.add_up(back(), total, of_loss)
    *parts, took_part = whole.split([*(weight.numel() for weight in weights), len(weights)])
    for weight, part, count in zip(weights, parts, took_part.tolist(), strict=True):
        weight.grad = part.view_as(weight) if count else None  # None, and the optimizer leaves it as it is


def _flat(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """All gradients in one vector, zeros for a weight that had no part in it; behind them a 1 for each that had."""
    parts = [
        torch.zeros_like(weight).flatten() if gradient is None else gradient.flatten()
        for gradient, weight in zip(gradients, weights, strict=True)
    ]
    return torch.cat([*parts, weights[0].new_tensor([gradient is not None for gradient in gradients])])
