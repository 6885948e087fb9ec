"""The training loop of the head, on the cached features of a frozen detector."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from iou_refiner.checks import DataError
from iou_refiner.detector.features import Extraction
from iou_refiner.evaluation.agreement import agreement
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.progress import Progress, no_progress
from iou_refiner.structures import FeatureMaps
from iou_refiner.training.losses import total_loss
from iou_refiner.training.run import TrainingRun
from iou_refiner.training.samples import Samples, Targets, TrainingSet, collate, sample_boxes
from iou_refiner.training.settings import TrainSettings

# Images that set the scale of the input layer.
_CALIBRATION_IMAGES = 32
_WARM_UP = 0.05  # share of all steps

#: Samples the boxes of an image, as :func:`sample_boxes` does.
SampleBoxes = Callable[..., Samples]
#: (head, embedding of R boxes, the boxes and their truth, image of each) to a loss.
Loss = Callable[[IoUHead, Tensor, Samples, Tensor], Tensor]


def train_head(
    head: IoUHead,
    train: TrainingSet,
    settings: TrainSettings | None = None,
    *,
    val: TrainingSet | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    sample: SampleBoxes = sample_boxes,
    loss: Loss = total_loss,
    progress: Progress = no_progress,
) -> list[dict[str, float]]:
    """Train ``head`` in place: AdamW, linear warm-up, cosine to zero.

    The detector stays frozen: training sees only its cached features, and its fingerprint is compared before and after.
    With the same seed, settings, number of threads and CPU the result is the same to the last bit, also when the run
    was stopped and resumed: every epoch draws from a generator of its own.

    Args:
        head: the head to train; its config chooses the losses (:mod:`iou_refiner.training.losses`).
        train: views of images to train on.
        settings: how; default :class:`TrainSettings`. Its ``views`` are those that ``train`` was made with.
        val: images to measure on after each epoch.
        seed: of everything random but the head's initial weights.
        output_dir: where to keep ``last.pt`` (to resume from), ``metrics.jsonl`` and ``head.safetensors``.
        resume: go on from ``last.pt`` in ``output_dir`` if it is there.
        sample: samples the boxes of an image, as :func:`sample_boxes` does.
        loss: of a batch of them, as :func:`total_loss`.
        progress: called after each step, in the phase "training".

    Returns:
        One dict of metrics per epoch.

    Raises:
        DataError: nothing to train on, a checkpoint of other settings, or a loss that is not finite.
        RuntimeError: the detector changed during training.
    """
    settings = settings or TrainSettings()
    if not len(train):
        raise DataError("The training set has no images.")
    fingerprint = train.cache.adapter.fingerprint()
    steps = math.ceil(len(train) / settings.batch_size)
    optimizer, schedule = _optimizer(head, settings, steps * settings.epochs)
    shares = {"candidate_share": settings.candidate_share, "jitter_min_iou": settings.jitter_min_iou}
    draw = partial(sample, count=settings.boxes_per_image, **shares)
    run = TrainingRun(output_dir, {**asdict(settings), "seed": seed, "images": len(train)}, head, optimizer, schedule)
    history = run.resume() if resume else []
    if not history:
        _calibrate(head, train)
    for epoch in range(len(history), settings.epochs):
        began, generator = time.perf_counter(), torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(train), generator=generator).tolist()
        total, boxes = 0.0, 0
        head.train()
        for step in range(steps):
            loaded = [train.load(row) for row in order[step * settings.batch_size : (step + 1) * settings.batch_size]]
            samples = [draw(extraction, targets, generator=generator) for extraction, targets in loaded]
            value, count = _step(head, loaded, samples, loss, optimizer)
            schedule.step()
            total, boxes = total + value * count, boxes + count
            progress("training", epoch * steps + step + 1, settings.epochs * steps)
        head.eval()
        metrics = {"epoch": epoch + 1, "loss": total / max(boxes, 1)} | (measure(head, val) if val else {})
        history.append(metrics | {"seconds": time.perf_counter() - began})
        run.save(history)
    if train.cache.adapter.fingerprint() != fingerprint:
        raise RuntimeError("The detector's weights changed while the head was trained; the head is not to be trusted.")
    return history


def _step(
    head: IoUHead,
    loaded: list[tuple[Extraction, Targets]],
    samples: list[Samples],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
) -> tuple[float, int]:
    """One step on the samples of some images; returns the loss and the number of boxes."""
    batch, image_index, table = _batch(head, [extraction.features for extraction, _ in loaded], samples)
    value = loss(head, head.roi_embedding(table, batch.boxes, image_index), batch, image_index)
    if not len(batch):
        return value.item(), 0
    if not torch.isfinite(value):
        images = ", ".join(str(extraction.image_id) for extraction, _ in loaded)
        raise DataError(f"The loss is {value.item()} on images {images}. Are their features finite?")
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()
    return value.item(), len(batch)


def measure(head: IoUHead, dataset: TrainingSet, *, above: float = 0.5) -> dict[str, float]:
    """How well the head predicts the true IoU of the detector's own candidates.

    Returns:
        On candidates whose true IoU is above ``above``: ``pearson`` and ``mae`` of the predicted IoU, ``pearson_score``
        of the class score, and ``candidates``, their number; on all candidates ``pearson_all`` and ``mae_all``. NaN
        where there are none.
    """
    return summarize(*predict_candidates(head, dataset)[[0, 2, 3]], above=above)


def summarize(iou: Tensor, scores: Tensor, true_iou: Tensor, *, above: float = 0.5) -> dict[str, float]:
    """What :func:`measure` returns, from predictions, class scores and true IoU (N,), NaN where it is not judged."""
    # A box without a prediction counts as in the stage: no evidence that it fits.
    predicted, score, truth = (column.double().numpy() for column in (iou.nan_to_num(0.0), scores, true_iou))
    high, everything = agreement(predicted, truth, above=above), agreement(predicted, truth, above=-math.inf)
    return {
        "pearson": high.pearson,
        "pearson_score": agreement(score, truth, above=above).pearson,
        "mae": high.mean_absolute_error,
        "mae_all": everything.mean_absolute_error,
        "pearson_all": everything.pearson,
        "candidates": high.count,
    }


@torch.no_grad()
def predict_candidates(head: IoUHead, dataset: TrainingSet) -> Tensor:
    """Predicted IoU, ranking, class score and true IoU of all candidates, (4, N); NaN where a box is not judged."""
    columns: list[Tensor] = []
    for index in range(len(dataset)):
        extraction, targets = dataset.load(index)
        candidates, table = extraction.candidates, head.encode(extraction.features)
        boxes, labels = candidates.boxes.to(head.device), candidates.labels.to(head.device)
        prediction = head.predict(table, boxes, torch.zeros_like(labels), labels)
        truth = targets.true_iou(candidates.boxes, candidates.labels)
        columns.append(torch.stack([prediction.iou.cpu(), prediction.ranking.cpu(), candidates.scores, truth]))
    return torch.cat(columns, 1)


def _batch(head: IoUHead, features: list[FeatureMaps], samples: list[Samples]) -> tuple[Samples, Tensor, FeatureTable]:
    """The boxes of several images in one, the image of each (R,), and the images' encoded features."""
    batch, image_index = collate(samples)
    # Images of different sizes share one table: each map keeps its own size, nothing is padded.
    table = FeatureTable.concat([head.encode(maps) for maps in features])
    return batch.to(head.device), image_index.to(head.device), table


@torch.no_grad()
def _calibrate(head: IoUHead, train: TrainingSet) -> None:
    """Divide the input layer by the size of each level's features, which in a frozen detector can be anything.

    Values that are not finite are passed over here: the training step reports them, with their image.
    """
    chosen = torch.linspace(0, len(train) - 1, min(_CALIBRATION_IMAGES, len(train))).long().tolist()
    loaded = [train.load(index)[0].features.levels for index in chosen]
    for index, narrow in enumerate(head.narrow):
        if isinstance(narrow, nn.Conv2d):
            power = torch.stack([_finite(levels[index]).double().square().mean() for levels in loaded]).nanmean()
            narrow.weight /= power.sqrt().clamp(min=1e-6).to(narrow.weight)


def _finite(values: Tensor) -> Tensor:
    return values[torch.isfinite(values)]


def _optimizer(
    head: IoUHead, settings: TrainSettings, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and its learning rate over ``steps`` steps: a linear warm-up, then a cosine to zero."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    warm_up = max(1, round(steps * _WARM_UP))

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
