"""The whole training in one call, from a detector and annotated images to a trained head: the command ``train``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.loading import Loading
from iou_refiner.detector.sources import FeatureSource
from iou_refiner.head.checkpoint import save_head
from iou_refiner.head.config import HeadConfig, HeadMetadata, TrainedCategory
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.parallel.ranks import current
from iou_refiner.progress import Progress, no_note, no_progress
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.sibling_net import SiblingNet
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.structures import FeatureMaps
from iou_refiner.training.before import check_objects, trained_categories
from iou_refiner.training.feature_samples import feature_samples
from iou_refiner.training.loop import train_head
from iou_refiner.training.samples import TrainingSet
from iou_refiner.training.settings import TrainSettings
from iou_refiner.training.sibling_training import MOST_IMAGES, train_siblings
from iou_refiner.training.sourcing import Part, training_sources
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
    siblings: SiblingConfig | None = SiblingConfig(),  # noqa: B008 - frozen
    cache: str | Path = "auto",
    loading: Loading | None = None,
    seed: int = 0,
    resume: bool = False,
    checkpoint_minutes: float = 10,
    device: torch.device | str = "cpu",
    note: Callable[[str], None] = print,
    progress: Progress = no_progress,
) -> list[dict[str, float]]:
    """Find the features, make the head, train it, and choose on val what the stage is to do with it.

    In each of the processes of a run (:func:`~iou_refiner.parallel.ranks.joined`), of which the first one speaks,
    writes and chooses.

    Args:
        adapter: the frozen detector.
        train_data: annotation and image folder.
        val_data: the same to measure on, and to choose the settings of the stage on (:func:`choose_settings`); the
            choice and its trials are kept in the head.
        output_dir: see :func:`train_head`.
        config: architecture of the head.
        settings: of the training. The fewer images, the more views pay; a cache grows with them.
        class_aware: one IoU for each of the detector's classes.
        siblings: architecture of the network over siblings, which is trained once the rest of the head is; None for a
            head without.
        cache: folder of a feature cache; "none" for the live detector in every epoch; "auto" for what is quicker, a
            cache being ``cache`` in ``output_dir`` (:mod:`iou_refiner.training.sourcing`). The head is the same.
        loading: how images reach the detector.
        seed: of everything random.
        resume, checkpoint_minutes: see :func:`train_head`.
        device: where the head trains.
        note: told what the features will cost before the detector runs for long, and what was chosen.
        progress: see :class:`Progress`.

    Returns:
        One dict of metrics per epoch; in the first process, the last one also has what the choice of settings measured
        on val.

    Raises:
        DataError: the data cannot teach (no objects, only crowds, no category that the detector knows), said before the
            detector runs; or as :func:`train_head`.
    """
    settings = (settings or TrainSettings()).of(len(train_data[0].images))
    if not current().first:
        note, progress = no_note, no_progress
    categories = _check_data(adapter, train_data[0], val_data[0] if val_data else None)
    output_dir.mkdir(parents=True, exist_ok=True)
    sets = _training_sets(
        adapter, train_data, val_data, settings, config, cache=cache, folder=output_dir, loading=loading or Loading(),
        note=note, progress=progress,
    )  # fmt: skip
    torch.manual_seed(seed)
    head = _new_head(adapter, sets[0], config, categories, class_aware).to(device)
    history = train_head(
        head, sets[0], settings, val=sets[1] if val_data else None, seed=seed, output_dir=output_dir, resume=resume,
        progress=progress, checkpoint_minutes=checkpoint_minutes,
    )  # fmt: skip
    if siblings and current().first:
        _listen_to_siblings(head, sets[0], siblings, output_dir, seed, progress)
    if val_data and current().first:
        choice = choose_on(head, sets[1].source.load, val_data[0], adapter, seed=seed, progress=progress)
        choice.keep_in(head)
        save_head(head, output_dir / "head.safetensors")
        history = [*history[:-1], history[-1] | choice.metrics()]
        choice.say(len(val_data[0].images), note)
    current().wait()
    return history


def _listen_to_siblings(
    head: IoUHead, train_set: TrainingSet, config: SiblingConfig, output_dir: Path, seed: int, progress: Progress
) -> None:
    """Give the trained head a network over siblings, trained on what its trunk makes of the survivors."""
    images = feature_samples(head, train_set, config, most=MOST_IMAGES, progress=progress)
    torch.manual_seed(seed)
    head.siblings = SiblingNet(config, embedding=head.trunk.out_features).to(head.device)
    train_siblings(head.siblings, images, seed=seed, progress=progress)
    save_head(head, output_dir / "head.safetensors")


def _training_sets(
    adapter: Adapter,
    train_data: tuple[GroundTruth, Path],
    val_data: tuple[GroundTruth, Path] | None,
    settings: TrainSettings,
    config: HeadConfig | None,
    **options: Any,
) -> list[TrainingSet]:
    """What is trained on, and what is measured on if there is any; their features are ready to be read."""
    parts = [Part(*train_data, settings.views_of(len(train_data[0].images)), settings.epochs)]
    parts += [Part(*val_data, 1, settings.epochs)] if val_data else []
    sources = training_sources(
        adapter, parts, check=lambda extraction: _check_fit(config, extraction.features), **options
    )
    sets = [TrainingSet(source, part.truth, views=part.views) for source, part in zip(sources, parts, strict=True)]
    _check_fit(config, sets[0].load(0)[0].features)  # of a cache that was full already
    return sets


def _new_head(
    adapter: Adapter,
    train_set: TrainingSet,
    config: HeadConfig | None,
    categories: tuple[TrainedCategory, ...],
    class_aware: bool,
) -> IoUHead:
    """An untrained head for the detector's features."""
    features = train_set.load(0)[0].features
    about = HeadMetadata(detector_name=adapter.name, fingerprint=adapter.fingerprint(), categories=categories)
    num_classes = max(train_set.labels) + 1 if class_aware else 0
    return IoUHead(features.channels, features.strides, config, num_classes=num_classes, metadata=about)


def _check_data(
    adapter: Adapter, train_truth: GroundTruth, val_truth: GroundTruth | None
) -> tuple[TrainedCategory, ...]:
    """Refuse data that cannot teach, or on which nothing can be measured; returns the categories trained on."""
    check_objects(train_truth, "training")
    if val_truth is not None:
        check_objects(val_truth, "validation")
        trained_categories(adapter.category_ids, val_truth, "validation")
    return trained_categories(adapter.category_ids, train_truth)


def choose_on(
    head: IoUHead,
    source: FeatureSource,
    truth: GroundTruth,
    adapter: Adapter,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Choice:
    """What the stage is best to do with a head on these images, see :func:`choose_settings`.

    Args:
        head: the trained head.
        source: the features of the images.
        truth: their annotation.
        adapter: the detector.
        seed, progress: as of :func:`choose_settings`.
    """
    candidates = Results.concat(dump_candidates(source, adapter.category_ids, truth))

    def run(stage_settings: StageSettings) -> Results:
        stage = Stage(head, stage_settings, own_threshold=adapter.nms_threshold)
        return Results.concat(rescore(source, adapter.category_ids, stage, candidates, truth))

    return choose_settings(head, run, truth, own_threshold=adapter.nms_threshold, seed=seed, progress=progress)


def _check_fit(config: HeadConfig | None, features: FeatureMaps) -> None:
    """Refuse a head that cannot be made for the detector's features, once the first image shows them."""
    try:
        with torch.device("meta"):
            IoUHead(features.channels, features.strides, config)
    except ValueError as error:
        raise DataError(f"This head cannot be made for this detector: {error}") from None
