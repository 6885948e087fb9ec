"""How good detections are.

The AP numbers are those of pycocotools, read from its arrays because its own summary hard-codes 100 detections and
prints. Detections are checked first: pycocotools counts a box of NaNs as a hit at every threshold, so a refinement that
diverged would look like a success. Nothing here needs torch, prints, or changes what it is given.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_refiner.checks import DataError, check_positive
from iou_refiner.coco import GroundTruth, Results
from iou_refiner.coco.data import FloatArray
from iou_refiner.evaluation.tables import Table

_LARGEST_SIDE = 1e5  # pixels, of the square where pycocotools' area ranges end
# The area range (all, small, medium, large) and the IoU thresholds (.50, .55, ... .95) that a metric averages over.
_PRECISIONS = {
    "AP": (0, slice(None)),
    "AP50": (0, slice(0, 1)),
    "AP60": (0, slice(2, 3)),
    "AP70": (0, slice(4, 5)),
    "AP75": (0, slice(5, 6)),
    "AP80": (0, slice(6, 7)),
    "AP90": (0, slice(8, 9)),
    "APs": (1, slice(None)),
    "APm": (2, slice(None)),
    "APl": (3, slice(None)),
}
METRICS = (*_PRECISIONS, "AR")


@dataclass(frozen=True)
class CategoryAP:
    """AP over IoU .50:.05:.95 of one category; NaN where it has no object."""

    id: int
    name: str
    ap: float


@dataclass(frozen=True, repr=False)
class Evaluation(Table):
    """The COCO numbers of one set of detections.

    Args:
        metrics: fraction in [0, 1] per name in :data:`METRICS`; NaN where there is no object to find.
        categories: AP of each category, by id.
        max_dets: how many detections counted per image and category.
        images: number of images.
        records: number of detections given.
    """

    metrics: Mapping[str, float]
    categories: tuple[CategoryAP, ...]
    max_dets: int
    images: int
    records: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return ("", "AP points")

    def rows(self) -> list[tuple[str, str]]:
        """A row ("AP", "17.9") per metric, in points; "-" where there is nothing to measure."""
        return [(name, points(value)) for name, value in self.metrics.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, fractions in [0, 1]; None where there is nothing to measure."""
        categories = [asdict(category) | {"ap": or_none(category.ap)} for category in self.categories]
        return {**asdict(self), "metrics": plain(self.metrics), "categories": categories}


def evaluate(results: Results, ground_truth: GroundTruth, *, max_dets: int = 100) -> Evaluation:
    """Measure detections as pycocotools does; by faster-coco-eval, which says the same, where that is installed.

    Args:
        results: the detections; none at all gives AP 0.
        ground_truth: all images that count, those without objects or detections too.
        max_dets: how many detections count, the best scored, **per image and category** as in pycocotools. The COCO
            server cuts per image over all categories.

    Returns:
        AP, AP50 to AP90, AP by size (APs, APm, APl) and AR at ``max_dets``, plus AP of each category.

    Raises:
        DataError: a box or score is not finite, a size is negative or absurdly large, an image or category is unknown,
            or a box of the ground truth is broken. The message names the first such record, counting from 1.
        ValueError: ``max_dets`` is not positive.
    """
    check_positive("max_dets", max_dets)
    check(ground_truth, results=results)
    return summary((fast_evaluator() or match)(results, ground_truth, max_dets), len(results))


def check(ground_truth: GroundTruth, **named: Results) -> None:
    """Refuse what pycocotools would turn into a silent wrong number."""
    images, categories = ([entry.id for entry in entries] for entries in (ground_truth.images, ground_truth.categories))
    finite = "must be four finite numbers. Repair or drop such boxes."
    wide = "must be [x, y, width, height], no size below 0."
    _refuse("ground_truth", ground_truth, "bbox", ~np.all(np.isfinite(ground_truth.bbox), axis=1), finite)
    _refuse("ground_truth", ground_truth, "bbox", np.any(ground_truth.bbox[:, 2:] < 0, axis=1), wide)
    for name, results in named.items():
        _refuse(name, results, "bbox", ~np.all(np.isfinite(results.bbox), axis=1), finite)
        _refuse(name, results, "score", ~np.isfinite(results.score), "must be a finite number.")
        _refuse(name, results, "bbox", np.any(results.bbox[:, 2:] < 0, axis=1), wide)
        # What is larger lies outside every area range: pycocotools ignores it instead of counting a false alarm.
        large = np.prod(np.sqrt(results.bbox[:, 2:]), axis=1) > _LARGEST_SIDE  # the roots do not overflow
        _refuse(name, results, "bbox", large, f"must not cover more than {_LARGEST_SIDE**2:.0e} square pixels.")
        hint = "must occur in the ground truth. Is it the one these detections were made for?"
        _refuse(name, results, "image_id", ~np.isin(results.image_id, images), hint)
        _refuse(name, results, "category_id", ~np.isin(results.category_id, categories), hint)


def _refuse(name: str, table: Results | GroundTruth, column: str, wrong: NDArray[np.bool_], rule: str) -> None:
    """Raise for the first wrong record, if any."""
    if wrong.any():
        first = int(np.argmax(wrong))
        value = getattr(table, column)[first].tolist()
        raise DataError(
            f"`{name}`: record {first + 1:,} (image {table.image_id[first]}), and {int(wrong.sum()) - 1:,} more: "
            f"`{column}` is {value}, but {rule}"
        )


#: Matches checked detections to objects and accumulates, for a number of detections per image and category: an
#: evaluator whose ``eval`` has the arrays of pycocotools.
Evaluator = Callable[[Results, GroundTruth, int], Any]


def match(results: Results, ground_truth: GroundTruth, max_dets: int) -> COCOeval:
    """Match checked detections to objects, and accumulate: an evaluator with ``evalImgs`` and ``eval``."""
    return _evaluated(COCO, COCOeval, results, ground_truth, max_dets)


def fast_evaluator() -> Evaluator | None:
    """faster-coco-eval, which does the same in C++ (without ``evalImgs``); None where it is not installed."""
    try:
        from faster_coco_eval import COCO as FastCOCO
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return None
    return partial(_evaluated, FastCOCO, COCOeval_faster)


def _evaluated(coco: Any, evaluate: Any, results: Results, ground_truth: GroundTruth, max_dets: int) -> Any:
    """An evaluator of either package, accumulated."""
    gt, dt = coco(), coco()
    gt.dataset = ground_truth.to_coco_dict()
    columns = (results.image_id, results.category_id, results.bbox, results.score)
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "score": score}
        for n, (image, category, box, score) in enumerate(zip(*(c.tolist() for c in columns), strict=True), start=1)
    ]
    # loadRes of pycocotools would do this too, but fails on an empty list.
    dt.dataset = {**gt.dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        dt.createIndex()
        evaluator = evaluate(gt, dt, "bbox")
        evaluator.params.maxDets = [max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def summary(evaluator: Any, records: int) -> Evaluation:
    """The numbers of an accumulated evaluator, whose -1 stands for absent categories."""
    precision = evaluator.eval["precision"][..., 0].mean(1).transpose(1, 2, 0)  # (K, A, T)
    recall = evaluator.eval["recall"][..., 0, 0].T  # (K, T)
    precision, recall = (np.where(values < 0, np.nan, values) for values in (precision, recall))
    categories = (
        CategoryAP(int(number), evaluator.cocoGt.cats[number]["name"], float(values.mean()))
        for number, values in zip(evaluator.params.catIds, precision[:, 0], strict=True)
    )
    return Evaluation(
        metrics={name: float(value[0]) for name, value in metrics(precision[None], recall[None]).items()},
        categories=tuple(categories),
        max_dets=evaluator.params.maxDets[0],
        images=len(evaluator.params.imgIds),
        records=records,
    )


def metrics(precision: FloatArray, recall: FloatArray) -> dict[str, FloatArray]:
    """Every metric (B,) from average precision (B, K, A, T) and recall (B, K, T); NaN marks an absent category."""
    means = {name: _mean_of_present(precision[:, :, area, part]) for name, (area, part) in _PRECISIONS.items()}
    return {**means, "AR": _mean_of_present(recall)}


def _mean_of_present(values: FloatArray) -> FloatArray:
    """Mean (B,) of the entries of (B, K, T) that are not NaN; NaN where there is none."""
    present = ~np.isnan(values)
    count = present.sum((1, 2))
    total = np.where(present, values, 0).sum((1, 2))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def points(value: float, sign: str = "") -> str:
    """A fraction in points with one decimal, never "-0.0"; "-" for NaN."""
    return "-" if np.isnan(value) else f"{round(100 * value, 1) + 0.0:{sign}.1f}"


def or_none(value: float) -> float | None:
    """What json can hold."""
    return None if np.isnan(value) else value


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What json can hold, value by value."""
    return {name: or_none(value) for name, value in values.items()}
