"""The training loop of the head, on the features of a frozen detector, in one process or many."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner.checks import DataError
from iou_refiner.detector.features import Extraction
from iou_refiner.evaluation.agreement import agreement
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.parallel.ranks import current
from iou_refiner.progress import Progress, no_progress
from iou_refiner.structures import FeatureMaps
from iou_refiner.training.losses import total_loss
from iou_refiner.training.run import Begun, TrainingRun
from iou_refiner.training.samples import Samples, TrainingSet, sample_boxes
from iou_refiner.training.schedule import warm_up_then_cosine
from iou_refiner.training.settings import TrainSettings
from iou_refiner.training.step import Loss, train_step

# Images that set the scale of the input layer, and the most that the head is measured on after an epoch.
_CALIBRATION_IMAGES, _MEASURED_IMAGES = 32, 1000

#: Samples the boxes of an image, as :func:`sample_boxes` does.
SampleBoxes = Callable[..., Samples]


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
    checkpoint_minutes: float = 10,
) -> list[dict[str, float]]:
    """Train ``head`` in place: AdamW, linear warm-up, cosine to zero.

    The detector stays frozen: training sees only its features, and its fingerprint is compared before and after. With
    the same seed, settings, number of threads and CPU the result is the same to the last bit, with any number of
    processes (:mod:`iou_refiner.parallel.ranks`), also when the run was stopped and resumed with another number of
    them: the order of an epoch, and the boxes of each image in it, are drawn from generators of their own.

    Args:
        head: the head to train; its config chooses the losses (:mod:`iou_refiner.training.losses`).
        train: views of images to train on.
        settings: how; default :class:`TrainSettings`. Its ``views`` are those that ``train`` was made with.
        val: images to measure on after each epoch; of more than 1,000, as many, spread over all of them.
        seed: of everything random but the head's initial weights.
        output_dir: where to keep ``last.pt`` (to resume from), ``metrics.jsonl`` and ``head.safetensors``.
        resume: go on from ``last.pt`` in ``output_dir`` if it is there.
        sample: samples the boxes of an image, as :func:`sample_boxes` does.
        loss: of a batch of them, as :func:`total_loss`.
        progress: called after each step, in the phase "training".
        checkpoint_minutes: how often the state to resume from is kept within an epoch; it is at the end of each.

    Returns:
        One dict of metrics per epoch.

    Raises:
        DataError: nothing to train on, a checkpoint of other settings, or a loss that is not finite.
        RuntimeError: the detector changed during training.
    """
    settings = settings or TrainSettings()
    if not len(train):
        raise DataError("The training set has no images.")
    fingerprint = train.source.adapter.fingerprint()
    steps = math.ceil(len(train) / settings.batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = warm_up_then_cosine(optimizer, steps * settings.epochs)
    about = {**asdict(settings), "seed": seed, "images": len(train)}
    run = TrainingRun(output_dir, about, head, optimizer, schedule, minutes=checkpoint_minutes)
    history, begun = run.resume() if resume else ([], Begun())
    if not history and not begun.steps:
        _calibrate(head, train)
    for epoch in range(len(history), settings.epochs):
        began = time.perf_counter()
        head.train()
        for extractions, samples, image_ids in _batches(train, settings, sample, seed, epoch, begun.steps):
            value, count = train_step(head, extractions, samples, image_ids, loss, optimizer)
            schedule.step()
            begun = begun.after(value, count)
            progress("training", epoch * steps + begun.steps, settings.epochs * steps)
            if begun.steps < steps:
                run.checkpoint(history, begun)
        head.eval()
        metrics = {"epoch": epoch + 1, "loss": begun.loss} | (measure(head, _some(val)) if val else {})
        history.append(metrics | {"seconds": time.perf_counter() - began})
        run.save(history)
        begun = Begun()
    if train.source.adapter.fingerprint() != fingerprint:
        raise RuntimeError("The detector's weights changed while the head was trained; the head is not to be trusted.")
    return history


def _batches(
    train: TrainingSet, settings: TrainSettings, sample: SampleBoxes, seed: int, epoch: int, after: int
) -> Iterator[tuple[list[Extraction], list[Samples], list[int]]]:
    """Of each batch of an epoch, from step ``after`` on: the extractions and samples of this process's images, and the
    ids of all."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    starts = range(after * settings.batch_size, len(order), settings.batch_size)
    batches = [order[start : start + settings.batch_size] for start in starts]
    mine = [current().mine(batch) for batch in batches]
    loaded = train.stream(list(chain.from_iterable(mine)))
    draw = partial(
        sample, count=settings.boxes_per_image, candidate_share=settings.candidate_share,
        jitter_min_iou=settings.jitter_min_iou,
    )  # fmt: skip
    for batch, rows in zip(batches, mine, strict=True):
        extractions, samples = [], []
        for row, (extraction, targets) in zip(rows, islice(loaded, len(rows)), strict=True):
            extractions.append(extraction)
            samples.append(draw(extraction, targets, generator=_generator(seed, epoch, row)))
        yield extractions, samples, [train.items[row][0].id for row in batch]


def _generator(*numbers: int) -> torch.Generator:
    """A generator of its own for each combination of numbers."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state))


def _some(dataset: TrainingSet) -> TrainingSet:
    """At most 1,000 images of it, spread over all."""
    if len(dataset) <= _MEASURED_IMAGES:
        return dataset
    part = copy.copy(dataset)
    rows = torch.linspace(0, len(dataset) - 1, _MEASURED_IMAGES).long().tolist()
    part.items = [dataset.items[row] for row in rows]
    return part


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
    """Predicted IoU, ranking, class score and true IoU of all candidates, (4, N); NaN where a box is not judged.

    The processes of a run share the work, and all of them get all of it.
    """
    columns: list[Tensor] = []
    for extraction, targets in dataset.stream(current().mine(range(len(dataset)))):
        candidates, table = extraction.candidates, head.encode(extraction.features)
        boxes, labels = candidates.boxes.to(head.device), candidates.labels.to(head.device)
        prediction = head.predict(table, boxes, torch.zeros_like(labels), labels)
        truth = targets.true_iou(candidates.boxes, candidates.labels)
        columns.append(torch.stack([prediction.iou.cpu(), prediction.ranking.cpu(), candidates.scores, truth], 1))
    return torch.cat(current().share(columns, len(dataset), torch.zeros(0, 4))).T


@torch.no_grad()
def _calibrate(head: IoUHead, train: TrainingSet) -> None:
    """Divide the input layer by the size of each level's features, which in a frozen detector can be anything.

    Values that are not finite are passed over here: the training step reports them, with their image.
    """
    chosen = torch.linspace(0, len(train) - 1, min(_CALIBRATION_IMAGES, len(train))).long().tolist()
    powers = [mean_squares(extraction.features)[None] for extraction, _ in train.stream(current().mine(chosen))]
    levels = torch.zeros(0, len(head.strides), dtype=torch.float64)
    scale_input_layer(head, torch.cat(current().share(powers, len(chosen), levels)).nanmean(0))


@torch.no_grad()
def scale_input_layer(head: IoUHead, power: Tensor) -> None:
    """Divide the weights that read each level by the root of its mean square, ``power`` (levels,)."""
    for index, narrow in enumerate(head.narrow):
        if isinstance(narrow, nn.Conv2d):
            narrow.weight /= power[index].sqrt().clamp(min=1e-6).to(narrow.weight)


def mean_squares(features: FeatureMaps) -> Tensor:
    """Of each level (levels,) float64, on the CPU."""
    return torch.stack([_finite(level).double().square().mean().cpu() for level in features.levels])


def _finite(values: Tensor) -> Tensor:
    return values[torch.isfinite(values)]
