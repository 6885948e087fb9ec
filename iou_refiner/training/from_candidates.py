"""The training of a head without features, from saved candidates and their annotation: ``train --detections``.

No detector, no images: a results file from before suppression is all that a network over siblings needs, on a machine
that has never seen the detector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.data import spread_rows
from iou_refiner.evaluation.ap import evaluate, or_none
from iou_refiner.head.checkpoint import save_head
from iou_refiner.head.config import HeadMetadata
from iou_refiner.head.sibling_head import SiblingHead
from iou_refiner.progress import Progress, no_progress
from iou_refiner.rescoring import rescore_saved, saved_likeness
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.likeness import check_likeness
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training.before import check_objects, trained_categories
from iou_refiner.training.candidate_set import candidate_samples
from iou_refiner.training.sibling_settings import SiblingSettings
from iou_refiner.training.sibling_training import MOST_IMAGES, train_siblings
from iou_refiner.training.tuning import choose_settings, own_behaviour
from iou_refiner.validation.nms_trace import suppressed_at

# Thresholds of greedy NMS that a detector may be used with; the best on val is what the head has to beat.
_OWN_THRESHOLDS = (0.5, 0.6, 0.65, 0.7)
# Beyond these validation images nothing is learned about settings that some minutes of evaluation would be worth.
_MOST_VAL_IMAGES = 1000


def train_from_candidates(
    train_data: tuple[Results, GroundTruth],
    val_data: tuple[Results, GroundTruth] | None = None,
    *,
    output_dir: Path,
    config: SiblingConfig | None = None,
    settings: SiblingSettings | None = None,
    detector_name: str = "",
    seed: int = 0,
    check: bool = True,
    note: Callable[[str], None] = print,
    progress: Progress = no_progress,
) -> list[dict[str, float]]:
    """Train a :class:`SiblingHead`, choose on val what to do with it, and write ``head.safetensors``.

    Args:
        train_data: candidates before suppression, and their annotation.
        val_data: the same of other images, to choose the settings of the stage on (:func:`choose_settings`).
        output_dir: where the head goes.
        config: the architecture.
        settings: of the training.
        detector_name: kept in the head, for messages.
        seed: of everything random.
        check: refuse candidates that look like boxes after suppression.
        note: told what was chosen.
        progress: see :class:`Progress`.

    Returns:
        One dict of metrics per epoch; the last one also has what the choice of settings measured on val.

    Raises:
        DataError: the data cannot teach: no objects, no shared category, boxes after suppression.
    """
    settings = settings or SiblingSettings()
    results, truth = train_data
    check_objects(truth, "training")
    categories = trained_categories(None, truth)
    if check:
        _check_before_suppression(results)
    torch.manual_seed(seed)
    head = SiblingHead(config, metadata=HeadMetadata(detector_name=detector_name, categories=categories))
    images = candidate_samples(results, truth, head.siblings.config, most=MOST_IMAGES)
    remembered = saved_likeness(results, head.siblings.config)
    history = train_siblings(head.siblings, images, settings, seed=seed, progress=progress)
    about: dict[str, Any] = {**asdict(settings), "seed": seed, "images": len(images)}
    metrics = {name: or_none(value) for name, value in history[-1].items() if name != "seconds"}
    head.metadata = replace(head.metadata, training=about, metrics=metrics, candidates=remembered)
    if val_data is not None:
        history[-1] |= _choose(head, *val_data, check=check, seed=seed, note=note, progress=progress)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_head(head, output_dir / "head.safetensors")
    return history


def _choose(
    head: SiblingHead,
    results: Results,
    truth: GroundTruth,
    *,
    check: bool,
    seed: int,
    note: Callable[[str], None],
    progress: Progress,
) -> dict[str, float]:
    """Choose on val what the stage is to do, keep the choice in the head, and return what was measured."""
    check_objects(truth, "validation")
    trained_categories(None, truth, "validation")
    results, truth = _at_most(results, truth, _MOST_VAL_IMAGES)
    if check:
        here = saved_likeness(results, head.siblings.config)
        check_likeness(head.metadata.candidates, here, "The validation candidates")

    def run(stage_settings: StageSettings) -> Results:
        return Results.concat(rescore_saved(Stage(head, stage_settings, own_threshold=None), results))

    aps = {value: evaluate(run(own_behaviour(value)), truth).metrics["AP"] for value in _OWN_THRESHOLDS}
    own = max(aps, key=lambda value: aps[value])
    choice = choose_settings(head, run, truth, own_threshold=own, seed=seed, progress=progress)
    choice.keep_in(head)
    head.metadata = replace(head.metadata, training={**head.metadata.training, "nms_threshold": own})
    choice.say(len(truth.images), note)
    return choice.metrics()


def _check_before_suppression(results: Results) -> None:
    threshold = suppressed_at(results)
    if threshold is not None:
        raise DataError(
            f"The candidates look already NMS-ed at about {threshold:.2f}: nothing is left to learn from the siblings "
            "of a box. Save the candidates before suppression: iou-refiner dump. Or add --no-check."
        )


def _at_most(results: Results, truth: GroundTruth, most: int) -> tuple[Results, GroundTruth]:
    """At most so many images of the annotation, spread over all, and their candidates."""
    if len(truth.images) <= most:
        return results, truth
    part = truth.only(truth.images[row].id for row in spread_rows(len(truth.images), most))
    return results[np.isin(results.image_id, [image.id for image in part.images])], part
