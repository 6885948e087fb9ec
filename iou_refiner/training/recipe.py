"""The whole training in one call: what the command ``train`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from iou_refiner.coco import GroundTruth
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.registry import detector_name
from iou_refiner.detector.sources import FeatureCache
from iou_refiner.head.checkpoint import read_metadata
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.training.loop import fit
from iou_refiner.training.samples import TrainingSet
from iou_refiner.training.tuning import choose_settings


def train_head(
    adapter: Adapter,
    train: tuple[GroundTruth, Path],
    val: tuple[GroundTruth, Path] | None = None,
    *,
    output_dir: Path,
    cache: Path | None = None,
    views: int = 4,
    class_aware: bool = False,
    head: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    note: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> list[dict[str, float]]:
    """From a detector and annotated images to a trained head.

    Fills the feature cache, makes the head, fits it, and with ``val`` chooses there what the stage is to do with it
    (:func:`choose_settings`); the choice is kept in the head, and its record in the head's notes.

    Args:
        adapter: the frozen detector.
        train: annotation and image folder.
        val: the same to measure on, and to choose the settings of the stage on.
        output_dir: see :func:`fit`.
        cache: folder of the feature cache; default ``cache`` in ``output_dir``.
        views: how many views of every image to train on (:class:`View`): 1 is the images alone. The fewer images, the
            more it pays; the cache grows with it.
        class_aware: one output for each of the detector's classes.
        head: settings of :class:`IoUPredictor`.
        device: where the head trains.
        note: told what the cache will cost, before it is filled, and what was chosen.
        progress: called with (phase, done, total).
        settings: of :func:`fit`.
    """
    store = FeatureCache(cache or output_dir / "cache", adapter)
    sets = [*((*train, view) for view in range(views)), *([(*val, 0)] if val else [])]
    for truth, folder, view in sets:
        _fill(store, truth, folder, view, note, progress)
    training_set = TrainingSet(store, train[0], views=views)
    seen = training_set.load(0)[0].features
    torch.manual_seed(settings.get("seed", 0))
    predictor = IoUPredictor(
        seen.channels, seen.strides, num_classes=max(training_set.labels) + 1 if class_aware else 0,
        detector=adapter.fingerprint(), detector_name=detector_name(adapter), **(head or {}),
    )  # fmt: skip
    history = fit(
        predictor.to(device), training_set, val=TrainingSet(store, val[0]) if val else None, output_dir=output_dir,
        progress=progress and (lambda done, total, loss: progress("training", done, total)), **settings,
    )  # fmt: skip
    if val:
        look = lambda image: store.load(image.id)  # noqa: E731 - all are in the cache by now
        chosen, trials = choose_settings(predictor, look, adapter.category_ids, val[0], progress=progress)
        predictor.recommended = chosen
        path = output_dir / "head.safetensors"
        notes = {name: read_metadata(path)[name] for name in ("metrics", "training")}
        predictor.save(path, **notes, trials=trials)
        note("Chosen on the validation images: " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
    return history


def _fill(
    store: FeatureCache,
    truth: GroundTruth,
    folder: Path,
    view: int,
    note: Callable[[str], None],
    progress: Callable[[str, int, int], None] | None,
) -> None:
    total = len(store.missing(truth.images, view=view))
    for done, extraction in enumerate(store.fill(folder, truth.images, view=view), 1):
        if done == 1:
            size = extraction.nbytes(store.dtype) * total / 1e9
            note(
                f"Features of {total:,} images{f', view {view}' if view else ''}: about {size:.2f} GB in {store.folder}"
            )
        if progress:
            progress(f"extracting view {view}" if view else "extracting", done, total)
