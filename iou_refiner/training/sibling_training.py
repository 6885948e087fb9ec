"""The training loop of a network over siblings.

The network is small and sees numbers, not pixels: a thousand images and some minutes of one core are enough, and ten
thousand teach it nearly all that a million would. So it learns from a bounded number of images, whose clusters are made
once and held in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from iou_refiner.checks import DataError
from iou_refiner.progress import Progress, no_progress
from iou_refiner.siblings.sibling_net import SiblingNet
from iou_refiner.training.cluster_samples import ClusterSamples
from iou_refiner.training.schedule import warm_up_then_cosine
from iou_refiner.training.sibling_losses import sibling_loss
from iou_refiner.training.sibling_settings import SiblingSettings

#: Images held in memory to learn from; of more, as many are taken, spread over all. About 80 kB each.
MOST_IMAGES = 10_000
_LONGEST_GRADIENT = 5.0


def train_siblings(
    net: SiblingNet,
    images: Sequence[ClusterSamples],
    settings: SiblingSettings | None = None,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[dict[str, float]]:
    """Train ``net`` in place: AdamW, linear warm-up, cosine to zero.

    Without embeddings, each image is seen in a mirror half of the time. With them, some batches are judged without, so
    that the network also knows what to say where nobody reads features.

    Args:
        net: the network to train.
        images: one image each.
        settings: how; default :class:`SiblingSettings`.
        seed: of everything random but the initial weights.
        progress: called after each step, in the phase "training on siblings".

    Returns:
        One dict of metrics per epoch.

    Raises:
        DataError: no image has a survivor to learn from, or a loss is not finite.
    """
    settings = settings or SiblingSettings()
    images = [image for image in images if len(image.clusters)]
    if not images:
        raise DataError("No image has a candidate to learn from. Give a results file of the annotated images.")
    steps = math.ceil(len(images) / settings.batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    epochs = settings.epochs_of(len(images))
    schedule = warm_up_then_cosine(optimizer, steps * epochs)
    history: list[dict[str, float]] = []
    net.train()
    for epoch in range(epochs):
        began, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for step, batch in enumerate(_batches(images, settings, generator), 1):
            total += _step(net, batch, optimizer)
            schedule.step()
            progress("training on siblings", epoch * steps + step, epochs * steps)
        history.append({"epoch": epoch + 1, "loss": total / steps, "seconds": time.perf_counter() - began})
    net.eval()
    return history


def _batches(
    images: Sequence[ClusterSamples], settings: SiblingSettings, generator: torch.Generator
) -> Iterator[ClusterSamples]:
    """The batches of an epoch."""
    order = torch.randperm(len(images), generator=generator).tolist()
    for start in range(0, len(order), settings.batch_size):
        batch = [images[row] for row in order[start : start + settings.batch_size]]
        mirrored = torch.rand(len(batch), generator=generator) < 0.5
        unseen = bool(torch.rand(1, generator=generator) < settings.embedding_dropout)
        if unseen or batch[0].embedding is None:
            batch = [image.mirrored() if flip else image for image, flip in zip(batch, mirrored, strict=True)]
        samples = ClusterSamples.concat([replace(image, embedding=None) for image in batch] if unseen else batch)
        yield samples.thinned(settings.sibling_dropout, generator)


def _step(net: SiblingNet, samples: ClusterSamples, optimizer: torch.optim.Optimizer) -> float:
    seen = samples.to(net.device)
    verdict = net(seen.boxes, seen.scores, seen.limits, seen.clusters, seen.embedding)
    loss = sibling_loss(verdict, samples)
    if not torch.isfinite(loss):
        raise DataError(f"The loss over siblings is {loss.item()}. Are the candidates' boxes and scores finite?")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), _LONGEST_GRADIENT)
    optimizer.step()
    return loss.item()
