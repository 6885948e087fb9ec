"""The whole training in one call, from a detector and annotated images to a trained head: the command ``train``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.sources import FeatureCache, FeatureSource
from iou_refiner.evaluation.ap import or_none
from iou_refiner.head.checkpoint import save_head
from iou_refiner.head.config import HeadConfig, HeadMetadata, TrainedCategory
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.progress import Progress, no_progress
from iou_refiner.structures import FeatureMaps
from iou_refiner.training.before import FEW_VAL_IMAGES, check_objects, trained_categories
from iou_refiner.training.loop import train_head
from iou_refiner.training.samples import TrainingSet
from iou_refiner.training.settings import TrainSettings
from iou_refiner.training.tuning import Choice, choose_settings


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
        One dict of metrics per epoch; the last one also has what the choice of settings measured on val.

    Raises:
        DataError: the data cannot teach (no objects, only crowds, no category that the detector knows), said before the
            detector runs; or as :func:`train_head`.
    """
    settings = settings or TrainSettings()
    categories = _check_data(adapter, train_data[0], val_data[0] if val_data else None)
    store = FeatureCache(cache or output_dir / "cache", adapter)
    for view in range(settings.views):
        _fill(store, *train_data, view, note, progress, config)
    if val_data:
        _fill(store, *val_data, 0, note, progress)
    train_set = TrainingSet(store.of(train_data[1]), train_data[0], views=settings.views)
    features = train_set.load(0)[0].features
    torch.manual_seed(seed)
    head = IoUHead(
        features.channels, features.strides, config, num_classes=max(train_set.labels) + 1 if class_aware else 0,
        metadata=HeadMetadata(
            detector_name=adapter.name, fingerprint=adapter.fingerprint(), categories=categories
        ),
    ).to(device)  # fmt: skip
    val = TrainingSet(store.of(val_data[1]), val_data[0]) if val_data else None
    history = train_head(
        head, train_set, settings, val=val, seed=seed,
        output_dir=output_dir, resume=resume, progress=progress,
    )  # fmt: skip
    if val_data:
        truth, source = val_data[0], store.of(val_data[1]).load  # all are in the cache by now
        choice = _choose(head, source, truth, adapter, output_dir, seed, progress)
        history = [*history[:-1], history[-1] | choice.metrics()]
        _say(choice, len(truth.images), note)
    return history


def _check_data(
    adapter: Adapter, train_truth: GroundTruth, val_truth: GroundTruth | None
) -> tuple[TrainedCategory, ...]:
    """Refuse data that cannot teach, or on which nothing can be measured; returns the categories trained on."""
    check_objects(train_truth, "training")
    if val_truth is not None:
        check_objects(val_truth, "validation")
        trained_categories(adapter.category_ids, val_truth, "validation")
    return trained_categories(adapter.category_ids, train_truth)


def _choose(
    head: IoUHead,
    source: FeatureSource,
    truth: GroundTruth,
    adapter: Adapter,
    output_dir: Path,
    seed: int,
    progress: Progress,
) -> Choice:
    """Choose on val what the stage is to do, and keep the choice in the head and its file."""
    choice = choose_settings(
        head, source, adapter.category_ids, truth, own_threshold=adapter.nms_threshold, seed=seed, progress=progress
    )
    about = head.metadata
    metrics = {**about.metrics, **{name: or_none(value) for name, value in choice.metrics().items()}}
    head.metadata = replace(
        about, recommended=asdict(choice.settings), trials=tuple(choice.trials), metrics=metrics
    )  # fmt: skip
    save_head(head, output_dir / "head.safetensors")
    return choice


def _say(choice: Choice, images: int, note: Callable[[str], None]) -> None:
    note("Chosen on the validation images: " + ", ".join(f"{k} {v}" for k, v in asdict(choice.settings).items()))
    if images < FEW_VAL_IMAGES:
        note(
            f"The validation set is small ({images} images, about {FEW_VAL_IMAGES} or more are needed): what was "
            "chosen on it, and its AP, may turn out otherwise on other images."
        )
    note(str(choice))


def _fill(
    store: FeatureCache,
    ground_truth: GroundTruth,
    folder: Path,
    view: int,
    note: Callable[[str], None],
    progress: Progress,
    config: HeadConfig | None = None,
) -> None:
    features = store.of(folder)
    total = len(features.missing(ground_truth.images, view=view))
    for done, extraction in enumerate(features.fill(ground_truth.images, view=view), 1):
        if done == 1:
            _check_fit(config, extraction.features)
            size, of_view = extraction.nbytes(store.dtype) * total / 1e9, f", view {view}" if view else ""
            note(f"Features of {total:,} images{of_view}: about {size:.2f} GB in {store.folder}")
        progress(f"extracting view {view}" if view else "extracting", done, total)
    for text in features.notes():
        note(text)


def _check_fit(config: HeadConfig | None, features: FeatureMaps) -> None:
    """Refuse a head that cannot be made for the detector's features, once the first image shows them."""
    try:
        with torch.device("meta"):
            IoUHead(features.channels, features.strides, config)
    except ValueError as error:
        raise DataError(f"This head cannot be made for this detector: {error}") from None
