"""``iou_refiner.evaluate``: what ``iou-refiner eval`` measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iou_refiner.evaluation.ap import Evaluation
from iou_refiner.evaluation.ap import evaluate as measure
from iou_refiner.evaluation.bootstrap import Comparison, compare
from iou_refiner.verbs.inputs import as_results, data_of


def evaluate(
    detections: Any,
    annotations: Any,
    *,
    baseline: Any = None,
    bootstrap: int = 1000,
    max_dets: int = 100,
    seed: int = 0,
    image_ids: str = "annotation",
    category_ids: str | Mapping[int, int] = "annotation",
    check: bool = True,
) -> Evaluation | Comparison:
    """COCO AP of saved detections; with ``baseline`` before, after, difference and 95 % interval.

    Args:
        detections: path of COCO results, a list of such records, a dict from image ids to boxes (arrays, tensors,
            ``supervision.Detections``), what :func:`iou_refiner.rescore` returned, or Results.
        annotations: path of a COCO annotation, its dict, GroundTruth, or a torch Dataset of ``(image, target)``.
        baseline: detections before, in any of these forms.
        bootstrap: resamples of the images for the interval, with ``baseline``.
        max_dets: detections that count per image and category, as in pycocotools.
        seed: of the resamples.
        image_ids, category_ids: of results files, where they are not those of the annotation:
            :func:`iou_refiner.connectors.ids.read_foreign_results`.
        check: refuse what ``iou-refiner validate`` calls an error.

    Returns:
        The numbers, a fraction in [0, 1] each: ``metrics["AP"]``; of a comparison ``before``, ``after``,
        ``differences`` and ``intervals``. It prints as a table.

    Raises:
        DataError: a record or annotation is wrong; it is named. TypeError: an argument is nothing of that kind.
    """
    options: dict[str, Any] = {"image_ids": image_ids, "category_ids": category_ids, "check": check}
    with data_of(annotations, None) as (ground_truth, _):
        after = as_results(detections, ground_truth, **options)
        if baseline is None:
            return measure(after, ground_truth, max_dets=max_dets)
        before = as_results(baseline, ground_truth, name="baseline", **options)
        return compare(before, after, ground_truth, resamples=bootstrap, seed=seed, max_dets=max_dets)
