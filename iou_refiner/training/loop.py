"""Train the IoU head on the cached features of a frozen detector."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iou_refiner.checks import DataError, check_fraction, check_positive
from iou_refiner.files import replacing, write_whole
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.pooling.table import FeaturePyramid
from iou_refiner.structures import FeatureMaps
from iou_refiner.training.losses import total_loss
from iou_refiner.training.samples import Samples, TrainingSet, collate, sample_boxes, true_iou

# Images that set the scale of the input layer.
_CALIBRATION_IMAGES = 32
_WARM_UP = 0.05  # share of all steps

#: Boxes of an image, drawn as :func:`sample_boxes` draws them.
Sample = Callable[..., Samples]
#: (head, what was read of R boxes, the boxes and their truth, image of each) to a loss.
Loss = Callable[[IoUPredictor, Tensor, Samples, Tensor], Tensor]


def fit(
    head: IoUPredictor,
    train: TrainingSet,
    *,
    val: TrainingSet | None = None,
    epochs: int = 2,
    batch_size: int = 8,
    boxes_per_image: int = 96,
    candidate_share: float = 0.5,
    lowest_iou: float = 0.2,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    sample: Sample = sample_boxes,
    loss: Loss = total_loss,
    progress: Callable[[int, int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``head`` in place: AdamW, linear warm-up, cosine to zero.

    The detector stays frozen: training sees only its cached features, and its fingerprint is compared before and after.
    With the same seed, settings, number of threads and CPU the result is the same to the last bit, also when the run
    was stopped and resumed: every epoch draws from a generator of its own.

    Args:
        head: the head to train; its objective chooses the loss on the IoU (BCE, or the paper's smooth-L1 on
            ``2 IoU - 1``), beside those on order and, if it regresses, way (:mod:`iou_refiner.training.losses`).
        train: images to train on.
        val: images to measure on after each epoch.
        epochs: passes over ``train``.
        batch_size: images a step.
        boxes_per_image: boxes drawn from each.
        candidate_share: share of them that are the detector's own candidates; the rest is jittered ground truth.
        lowest_iou: low end of the jitter.
        lr: peak learning rate.
        weight_decay: of AdamW.
        seed: of everything random but the head's initial weights.
        output_dir: where to keep ``last.pt`` (to resume from), ``metrics.jsonl`` and ``head.safetensors``.
        resume: go on from ``last.pt`` in ``output_dir`` if it is there.
        sample: draws the boxes of an image, as :func:`sample_boxes` does.
        loss: of a batch of them, as :func:`total_loss`.
        progress: called after each step with (step, steps in all, loss).

    Returns:
        One dict of metrics per epoch.

    Raises:
        ValueError: a setting is out of range. DataError: nothing to train on, a checkpoint of other settings, or a loss
            that is not finite. RuntimeError: the detector changed during training.
    """
    check_positive("epochs", epochs)
    check_positive("batch_size", batch_size)
    check_positive("boxes_per_image", boxes_per_image)
    check_positive("lr", lr)
    check_fraction("candidate_share", candidate_share)
    if not len(train):
        raise DataError("The training set has no images.")
    frozen = train.cache.adapter.fingerprint()
    settings = {
        "epochs": epochs, "batch_size": batch_size, "boxes_per_image": boxes_per_image, "seed": seed, "lr": lr,
        "candidate_share": candidate_share, "lowest_iou": lowest_iou, "weight_decay": weight_decay,
        "images": len(train),
    }  # fmt: skip
    steps_per_epoch = math.ceil(len(train) / batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps_per_epoch * epochs))
    run = _Run(output_dir, settings)
    history = run.resume(head, optimizer, schedule) if resume else []
    if not history:
        _calibrate(head, train)
    for epoch in range(len(history), epochs):
        began, total, boxes = time.perf_counter(), 0.0, 0
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(train), generator=generator).tolist()
        head.train()
        for step in range(steps_per_epoch):
            chosen = shuffled[step * batch_size : (step + 1) * batch_size]
            loaded = [train.load(index) for index in chosen]
            samples = [
                sample(
                    extraction, objects, boxes_per_image,
                    candidate_share=candidate_share, lowest_iou=lowest_iou, generator=generator,
                )
                for extraction, objects in loaded
            ]  # fmt: skip
            asked, image_index, pyramid = _batch(head, [extraction.features for extraction, _ in loaded], samples)
            value = loss(head, head.read(pyramid, asked.boxes, image_index), asked, image_index)
            if count := len(asked.iou):
                if not torch.isfinite(value):
                    images = ", ".join(str(extraction.image_id) for extraction, _ in loaded)
                    raise DataError(f"The loss is {value.item()} on images {images}. Are their features finite?")
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                total, boxes = total + value.item() * count, boxes + count
            schedule.step()
            if progress:
                progress(epoch * steps_per_epoch + step + 1, epochs * steps_per_epoch, value.item())
        head.eval()
        metrics = {"epoch": epoch + 1, "loss": total / max(boxes, 1), "seconds": time.perf_counter() - began}
        if val is not None:
            metrics |= measure(head, val)
        history.append(metrics)
        run.save(head, optimizer, schedule, history)
    if train.cache.adapter.fingerprint() != frozen:
        raise RuntimeError("The detector's weights changed while the head was trained; the head is not to be trusted.")
    return history


def measure(head: IoUPredictor, dataset: TrainingSet, *, above: float = 0.5) -> dict[str, float]:
    """How well the head knows the true IoU of the detector's own candidates.

    Returns:
        On candidates whose true IoU is above ``above``: ``pearson`` and ``mae`` of the predicted IoU, ``pearson_score``
        of the class score, and ``candidates``, their number; on all candidates ``pearson_all`` and ``mae_all``. NaN
        where there are none.
    """
    predicted, _, scores, truth = judgements(head, dataset)
    return agreement(predicted, scores, truth, above=above)


def agreement(predicted: Tensor, scores: Tensor, truth: Tensor, *, above: float = 0.5) -> dict[str, float]:
    """What :func:`measure` returns, of predictions, class scores and true IoUs (N,); NaN where the truth is unknown."""
    predicted, scores, truth = predicted.double(), scores.double(), truth.double()
    judged = torch.isfinite(truth)
    high = judged & (truth > above)
    return {
        "pearson": _pearson(predicted[high], truth[high]),
        "pearson_score": _pearson(scores[high], truth[high]),
        "mae": (predicted - truth)[high].abs().mean().item(),
        "mae_all": (predicted - truth)[judged].abs().mean().item(),
        "pearson_all": _pearson(predicted[judged], truth[judged]),
        "candidates": int(high.sum()),
    }


@torch.no_grad()
def judgements(head: IoUPredictor, dataset: TrainingSet) -> Tensor:
    """Predicted IoU, worth, class score and true IoU of all candidates, (4, N); NaN where the truth cannot be known."""
    columns: list[Tensor] = []
    for index in range(len(dataset)):
        extraction, objects = dataset.load(index)
        found, pyramid = extraction.candidates, head.encode(extraction.features)
        asked = found.to(pyramid.table.device)
        ious, worths = head.judge(pyramid, asked.boxes, torch.zeros_like(asked.labels), asked.labels)
        truth = true_iou(found.boxes, found.labels, objects)
        columns.append(torch.stack([ious.cpu(), worths.cpu(), found.scores, truth]))
    return torch.cat(columns, 1)


def _batch(
    head: IoUPredictor, features: list[FeatureMaps], samples: list[Samples]
) -> tuple[Samples, Tensor, FeaturePyramid]:
    """The boxes of several images in one, the image of each (R,), and the images' encoded features."""
    device = head.output.weight.device
    asked, image_index = collate(samples)
    # Images of different sizes share one table: each map keeps its own size, nothing is padded.
    pyramid = FeaturePyramid.concat([head.encode(maps) for maps in features])
    return asked.to(device), image_index.to(device), pyramid


@torch.no_grad()
def _calibrate(head: IoUPredictor, train: TrainingSet) -> None:
    """Divide the input layer by the size of each level's features, which in a frozen detector can be anything.

    Values that are not finite are passed over here: it is the training step that reports them, with their image.
    """
    chosen = torch.linspace(0, len(train) - 1, min(_CALIBRATION_IMAGES, len(train))).long().tolist()
    loaded = [train.load(index)[0].features.levels for index in chosen]
    for index, narrow in enumerate(head.narrow):
        if isinstance(narrow, nn.Conv2d):
            power = torch.stack([_finite(levels[index]).double().square().mean() for levels in loaded]).nanmean()
            narrow.weight /= power.sqrt().clamp(min=1e-6).to(narrow.weight)


def _finite(values: Tensor) -> Tensor:
    return values[torch.isfinite(values)]


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, round(steps * _WARM_UP))
    return lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _pearson(a: Tensor, b: Tensor) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return math.nan
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


class _Run:
    """The files of a training run. Everything is written beside and renamed."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.settings = settings
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def resume(self, head: IoUPredictor, optimizer: Any, schedule: Any) -> list[dict[str, float]]:
        if not self.folder or not (self.folder / "last.pt").exists():
            return []
        state = torch.load(self.folder / "last.pt", weights_only=True, map_location=head.output.weight.device)
        changed = [name for name, value in self.settings.items() if state["settings"].get(name) != value]
        if changed:
            raise DataError(
                f"{self.folder / 'last.pt'} was made with another {', '.join(changed)}: "
                "resume with the same settings, or train into another folder."
            )
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history: list[dict[str, float]] = state["history"]
        return history

    def save(self, head: IoUPredictor, optimizer: Any, schedule: Any, history: list[dict[str, float]]) -> None:
        if not self.folder:
            return
        metrics = {name: value for name, value in history[-1].items() if name != "seconds"}  # same seed, same bytes
        head.save(self.folder / "head.safetensors", metrics=metrics, training=self.settings)
        lines = "".join(json.dumps(entry) + "\n" for entry in history)
        write_whole(self.folder / "metrics.jsonl", lines.encode())
        state = {
            "head": head.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "history": history, "settings": self.settings,
        }  # fmt: skip
        with replacing(self.folder / "last.pt") as stream:
            torch.save(state, stream)
