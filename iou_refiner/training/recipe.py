"""The whole training in one call, from a detector and annotated images to a trained head: the command ``train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from iou_refiner.coco import GroundTruth
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.checkpoint import save_head
from iou_refiner.head.config import HeadConfig, HeadMetadata
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.progress import Progress, no_progress
from iou_refiner.training.loop import train_head
from iou_refiner.training.samples import TrainingSet
from iou_refiner.training.settings import TrainSettings
from iou_refiner.training.tuning import choose_settings


def train(
    adapter: Adapter,
    train_data: tuple[GroundTruth, Path],
    val_data: tuple[GroundTruth, Path] | None = None,
    *,
    output_dir: Path,
    config: HeadConfig | None = None,
    settings: TrainSettings | None = None,
    class_aware: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    device: torch.device | str = "cpu",
    note: Callable[[str], None] = print,
    progress: Progress = no_progress,
) -> list[dict[str, float]]:
    """Fill the feature cache, make the head, train it, and choose on val what the stage is to do with it.

    Args:
        adapter: the frozen detector.
        train_data: annotation and image folder.
        val_data: the same to measure on, and to choose the settings of the stage on (:func:`choose_settings`); the
            choice and its trials are kept in the head.
        output_dir: see :func:`train_head`.
        config: architecture of the head.
        settings: of the training. The fewer images, the more views pay; the cache grows with them.
        class_aware: one IoU for each of the detector's classes.
        cache: folder of the feature cache; default ``cache`` in ``output_dir``.
        seed: of everything random.
        resume: see :func:`train_head`.
        device: where the head trains.
        note: told what the cache will cost before it is filled, and what was chosen.
        progress: see :class:`Progress`.

    Returns:
        One dict of metrics per epoch.
    """
    settings = settings or TrainSettings()
    store = FeatureCache(cache or output_dir / "cache", adapter)
    for view in range(settings.views):
        _fill(store, *train_data, view, note, progress)
    if val_data:
        _fill(store, *val_data, 0, note, progress)
    train_set = TrainingSet(store, train_data[0], views=settings.views)
    features = train_set.load(0)[0].features
    torch.manual_seed(seed)
    head = IoUHead(
        features.channels, features.strides, config, num_classes=max(train_set.labels) + 1 if class_aware else 0,
        metadata=HeadMetadata(detector_name=adapter.name, fingerprint=adapter.fingerprint()),
    ).to(device)  # fmt: skip
    history = train_head(
        head, train_set, settings, val=TrainingSet(store, val_data[0]) if val_data else None, seed=seed,
        output_dir=output_dir, resume=resume, progress=progress,
    )  # fmt: skip
    if val_data:
        source = lambda image: store.load(image.id)  # noqa: E731 - all are in the cache by now
        chosen, trials = choose_settings(head, source, adapter.category_ids, val_data[0], progress=progress)
        head.metadata = replace(head.metadata, recommended=asdict(chosen), trials=tuple(trials))
        save_head(head, output_dir / "head.safetensors")
        note("Chosen on the validation images: " + ", ".join(f"{k} {v}" for k, v in asdict(chosen).items()))
    return history


def _fill(
    store: FeatureCache,
    ground_truth: GroundTruth,
    folder: Path,
    view: int,
    note: Callable[[str], None],
    progress: Progress,
) -> None:
    total = len(store.missing(ground_truth.images, view=view))
    for done, extraction in enumerate(store.fill(folder, ground_truth.images, view=view), 1):
        if done == 1:
            size, of_view = extraction.nbytes(store.dtype) * total / 1e9, f", view {view}" if view else ""
            note(f"Features of {total:,} images{of_view}: about {size:.2f} GB in {store.folder}")
        progress(f"extracting view {view}" if view else "extracting", done, total)
