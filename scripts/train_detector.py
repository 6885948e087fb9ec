"""Train the small Faster R-CNN of examples/small_detectors.py on a data set in COCO format, or go on training it.

    python -m scripts.train_detector --ann TRAIN.json --val-ann VAL.json --images FOLDER --output DIR [--weights FILE]

Starts from FILE, or from a backbone trained on ImageNet. Leaves in DIR the weights after every epoch,
``epoch-XX.safetensors``, the ones with the highest AP on val, ``best.safetensors``, and ``metrics.jsonl``. A run that
was stopped goes on with ``--resume`` from ``last.pt`` and ends with the same weights as one that was not. What comes
out is a detector for every command:

    iou-refiner train --detector examples/small_detectors.py:faster_rcnn:DIR/best.safetensors ...

``--joint`` trains an IoU head together with it (docs/joint.md): ``head-XX.safetensors`` after every epoch, and
``head.safetensors``, which belongs to ``best.safetensors``. Under torchrun each process takes its part of every batch.

Time on one core of 2025: .2 seconds an image of 320 pixels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.small_detectors import SIZE, network
from iou_refiner import IoUHead, IoURefiner, save_head
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.checks import DataError, check_positive
from iou_refiner.cli.console import Console
from iou_refiner.coco import GroundTruth, Image, Results, read_ground_truth, xyxy_to_xywh
from iou_refiner.detector.images import open_image
from iou_refiner.evaluation.ap import evaluate
from iou_refiner.files import replacing, write_whole
from iou_refiner.parallel.ranks import current, joined
from iou_refiner.progress import Progress, no_progress
from iou_refiner.training.before import trained_categories
from iou_refiner.training.joint import belonging_to, new_head
from scripts.training_images import TrainingImages

# The backbone knows photographs already: it learns slower than what is new.
_BACKBONE_RATE = 0.3
# The head is new: at the rate of a training of its own, where the detector has its default.
_HEAD_RATE = 2.5
_HEAD_IMAGES = 8  # that show an untrained head how large the features are
_WARM_UP = 0.05  # share of all steps
_METRICS = ("AP", "AP50", "AP75", "AP90")


class Training:
    """The weights and all that changes with them, saved in a folder after every epoch; perhaps with a head."""

    def __init__(
        self, adapter: TorchvisionAdapter, steps: int, lr: float, folder: Path, settings: dict[str, Any],
        head: IoUHead | None = None,
    ):  # fmt: skip
        self.detector, self.folder, self.settings = adapter.detector, folder, settings
        self.adapter, self.head = adapter, head
        self.detector.to(memory_format=torch.channels_last)  # which depthwise convolutions prefer
        pretrained = set(self.detector.backbone.m.parameters())
        learned = [weight for weight in self.detector.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in learned if weight not in pretrained]},
            {"params": [weight for weight in learned if weight in pretrained]},
        ]
        rates = [lr, _BACKBONE_RATE * lr]
        if head:
            groups.append({"params": list(head.parameters())})
            rates.append(_HEAD_RATE * lr)
        self.parts: dict[str, Any] = {"detector": self.detector} | ({"head": head} if head else {})
        self.model: Any = IoURefiner(adapter, head) if head else self.detector
        if current().count > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rates, total_steps=steps, pct_start=_WARM_UP, cycle_momentum=False
        )
        self.parts |= {"optimizer": self.optimizer, "schedule": self.schedule}
        self.history: list[dict[str, float]] = []

    def step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
        """One step on a batch; its loss."""
        # In float32: autocast to bfloat16 takes a fifth less time, but would put boxes on a grid of one or two pixels.
        loss = sum(self.model(images, targets).values())
        if not torch.isfinite(loss):
            raise DataError(f"The loss is {loss.item()}. Are the images and boxes sound? Else lower --lr.")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.detector.parameters(), 10.0)  # whatever the head's
        self.optimizer.step()
        self.schedule.step()
        return float(loss.item())

    def resume(self) -> None:
        """Go on where :meth:`save` left off."""
        state = torch.load(self.folder / "last.pt", weights_only=True)
        changed = [name for name, value in self.settings.items() if state["settings"].get(name, False) != value]
        if changed:
            raise DataError(
                f"{self.folder / 'last.pt'} was made with another {', '.join(changed)}: resume with the same."
            )
        self.history = state["history"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def save(self, metrics: dict[str, float]) -> None:
        """Save the end of an epoch. ``last.pt`` comes last: whatever is lost before it is made again."""
        self.history.append(metrics)
        tensors = {name: tensor.contiguous() for name, tensor in self.detector.state_dict().items()}
        weights = safetensors.torch.save(tensors, {"size": str(self.settings["size"])})
        best = metrics["AP"] == max(epoch["AP"] for epoch in self.history)
        if self.head:
            self.head.metadata = belonging_to(self.head, self.adapter)
            for name in [f"head-{len(self.history):02}", *(["head"] if best else [])]:
                save_head(self.head, self.folder / f"{name}.safetensors")
        write_whole(self.folder / f"epoch-{len(self.history):02}.safetensors", weights)
        if best:
            write_whole(self.folder / "best.safetensors", weights)
        write_whole(self.folder / "metrics.jsonl", "".join(json.dumps(e) + "\n" for e in self.history).encode())
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with replacing(self.folder / "last.pt") as stream:
            torch.save(state | {"history": self.history, "settings": self.settings}, stream)


def detect(adapter: TorchvisionAdapter, folder: Path, truth: GroundTruth) -> Results:
    """The detector's own detections on all images."""
    return Results.concat(_detect(adapter, folder, image) for image in truth.images)


@torch.no_grad()
def _detect(adapter: TorchvisionAdapter, folder: Path, image: Image) -> Results:
    pixels, transform = adapter.prepare(open_image(folder, image))
    (detections,) = adapter.detector([pixels])
    return Results(
        image_id=np.full(len(detections["boxes"]), image.id, np.int64),
        category_id=detections["labels"].numpy(),
        bbox=xyxy_to_xywh(transform.to_image(detections["boxes"]).double().numpy()),
        score=detections["scores"].double().numpy(),
    )


def train(
    adapter: TorchvisionAdapter,
    images: TrainingImages,
    val: tuple[GroundTruth, Path],
    *,
    output: Path,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int = 0,
    resume: bool = False,
    head: IoUHead | None = None,
    progress: Progress = no_progress,
) -> Iterator[dict[str, float]]:
    """AdamW over torchvision's own losses, and those of a head if there is one, a short warm-up, then a cosine to zero.

    Yields the metrics of each epoch, in the first of several processes.
    """
    steps = math.ceil(len(images) / batch_size)
    settings = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "images": len(images)}
    about = settings | {"size": adapter.longest_side, "joint": head is not None}
    training, ranks = Training(adapter, epochs * steps, lr, output, about, head), current()
    if resume and (output / "last.pt").exists():
        training.resume()
    for epoch in range(len(training.history), epochs):
        # Every epoch draws order, views and torchvision's samples anew from its number: nothing of it need be saved.
        torch.manual_seed(seed * 1_000_003 + epoch)
        order, total, began = torch.randperm(len(images)).tolist(), 0.0, time.process_time()
        if ranks.count > 1:
            torch.manual_seed((seed * 1_000_003 + epoch) * 1009 + ranks.rank)
        training.model.train()
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            batch = [images.load(index, epoch) for index in ranks.mine(rows) or rows[:1]]
            total += training.step([pixels for pixels, _ in batch], [target for _, target in batch])
            progress("training", epoch * steps + step + 1, epochs * steps)
        seconds = (time.process_time() - began) / len(images)
        training.model.eval()
        if ranks.first:
            measured = evaluate(detect(adapter, val[1], val[0]), val[0]).metrics
            metrics = {"epoch": epoch + 1, "loss": total / steps, "cpu_seconds_an_image": seconds}
            training.save(metrics | {name: measured[name] for name in _METRICS})
            yield training.history[-1]
        ranks.wait()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in (("ann", "COCO annotation to learn"), ("val-ann", "to measure on"), ("images", "their folder")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=about)
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--weights", type=Path, help="of this network, for as many classes: start from them")
    parser.add_argument("--size", type=int, default=SIZE, help="longest side of the images in pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=4e-4, help="highest learning rate")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    parser.add_argument("--joint", action="store_true", help="train an IoU head together with the detector")
    options = parser.parse_args(arguments)
    for name in ("size", "epochs", "lr", "batch_size"):
        check_positive(name, getattr(options, name))
    if (options.output / "last.pt").exists() and not options.resume:
        parser.error(f"{options.output} holds a training already. Add --resume, or name another folder.")
    return options


def untrained_head(images: TrainingImages) -> IoUHead:
    """For the detector of these images, as it is now."""
    images.adapter.detector.eval()
    truth = images.truth
    shown = [open_image(images.folder, image) for image in truth.images[:_HEAD_IMAGES]]
    categories = trained_categories(images.adapter.category_ids, truth)
    return new_head(images.adapter, [images.adapter.prepare(rgb)[0] for rgb in shown], categories=categories)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    truth, val = read_ground_truth(options.ann), read_ground_truth(options.val_ann)
    detector = network(max(category.id for category in truth.categories), options.size)  # labels are category ids
    if options.weights:
        detector.load_state_dict(safetensors.torch.load_file(options.weights))
    adapter = TorchvisionAdapter(detector, longest_side=options.size)
    options.output.mkdir(parents=True, exist_ok=True)
    images = TrainingImages(adapter, options.images, truth)
    with joined() as ranks:
        console = Console(as_json=False, device="cpu", seed=options.seed, quiet=not ranks.first, verbose=False)
        with console.progress() as progress:
            for metrics in train(
                adapter, images, (val, options.images), output=options.output, epochs=options.epochs, lr=options.lr,
                batch_size=options.batch_size, seed=options.seed, resume=options.resume,
                head=untrained_head(images) if options.joint else None, progress=progress,
            ):  # fmt: skip
                console.note(" ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
