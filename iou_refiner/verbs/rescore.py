"""``iou_refiner.rescore``: what ``iou-refiner rescore`` does, in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iou_refiner.coco import GroundTruth, Results, write_results
from iou_refiner.connectors.data_set import columns_of_results, images_of_results
from iou_refiner.connectors.image import to_supervision
from iou_refiner.evaluation.tables import Table
from iou_refiner.progress import Progress
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.summary import Summary
from iou_refiner.verbs.inputs import as_detector, as_device, as_results, check_images_exist, data_of, watched

if TYPE_CHECKING:
    from iou_refiner.head.checkpoint import Head
    from iou_refiner.head.iou_head import IoUHead
    from iou_refiner.head.sibling_head import SiblingHead


@dataclass(frozen=True, repr=False)
class Rescored(Table):
    """Better detections of many images.

    Args:
        results: the detections, category ids and image ids as they came.
        summary: what became of every record that came in.
        settings: what was done with them.
        image_order: ids of the images in the order in which they came.
    """

    results: Results
    summary: Summary
    settings: StageSettings
    image_order: tuple[int, ...]

    @property
    def caption(self) -> str:
        """What became of the records, in a sentence."""
        return str(self.summary)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return ("", "records")

    def rows(self) -> list[tuple[str, str]]:
        """A row ("suppressed", "1,234") per count."""
        counts = self.summary.to_dict()
        dropped = counts.pop("dropped")
        return [(name, f"{count:,}") for name, count in {**counts, **dropped}.items()]

    def save(self, path: str | PathLike[str]) -> Path:
        """Write COCO results, .json or .json.gz, beside and renamed; what stands there is replaced."""
        path = Path(fspath(path))
        write_results(path, self.results, image_order=self.image_order)
        return path

    def by_image(self) -> dict[int, dict[str, np.ndarray]]:
        """By image id arrays of ``boxes`` (N, 4) xyxy in image pixels, ``scores``, ``labels``, and ``ious``."""
        return images_of_results(self.results)

    def to_supervision(self) -> dict[int, Any]:
        """By image id ``supervision.Detections``, the predicted IoU in ``data["iou"]``."""
        return {image_id: to_supervision(image) for image_id, image in self.by_image().items()}

    def to_columns(self) -> dict[str, np.ndarray]:
        """A column a key, a row a detection: ``pandas.DataFrame(rescored.to_columns())``."""
        return columns_of_results(self.results)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json: what became of the records."""
        return {**self.summary.to_dict(), "records": len(self.results)}


def rescore(
    detections: Any,
    *,
    head: Any,
    detector: Any = None,
    annotations: Any = None,
    images: str | PathLike[str] | None = None,
    settings: StageSettings | None = None,
    cache: str | PathLike[str] | None = None,
    device: Any = "auto",
    image_ids: str = "annotation",
    category_ids: str | Mapping[int, int] = "annotation",
    check: bool = True,
    progress: bool | Progress = True,
    **changes: Any,
) -> Rescored:
    """Rescore, suppress and refine saved detections with a trained head.

    A run that is stopped starts anew; the command ``iou-refiner rescore`` goes on where it was.

    Args:
        detections: in any form that :func:`iou_refiner.evaluate` takes, best before suppression.
        head: a trained head, the path of one, or what :func:`iou_refiner.train` returned.
        detector: whose features the head reads, as of :func:`iou_refiner.train`; a head trained on ``detections`` alone
            needs neither this nor ``images``.
        annotations: path of a COCO annotation, its dict, GroundTruth, or a Dataset; only its images and categories are
            read. A head without features needs none, and checks records only where there is one.
        images: folder of the images.
        settings: of the stage; default: what the head recommends.
        cache: folder to keep and reuse features in.
        device: "auto", or one of torch's. "auto" leaves a live detector where it is.
        image_ids, category_ids: of a results file, as of :func:`iou_refiner.evaluate`.
        check: refuse what ``iou-refiner validate`` calls an error, and candidates unlike those trained on.
        progress: bars for True, nothing for False, or what is called as work goes on.
        changes: settings to exchange, by name, as ``ascent_steps=0``.

    Returns:
        The detections: ``save(path)``, ``by_image()``, ``to_supervision()``, ``to_columns()``; counts as a table.

    Raises:
        DataError: a record is wrong, or the head is of another detector. ValueError: a setting is out of range, or an
            argument is missing.
    """
    from iou_refiner.head.sibling_head import SiblingHead

    loaded = _head(head)
    ids: dict[str, Any] = {"image_ids": image_ids, "category_ids": category_ids, "check": check}
    if isinstance(loaded, SiblingHead):
        return _alone(detections, loaded, annotations, settings, changes, progress, ids)
    if detector is None or annotations is None:
        raise ValueError(
            "This head reads the features of a detector: `detector`, `annotations` and `images` are needed. A head "
            "that needs none of them: train(detections=..., annotations=...)."
        )
    with data_of(annotations, images) as (truth, folder), watched(progress) as (bars, _):
        if folder is None:
            raise ValueError("`images` is needed: the folder of the images of the annotation.")
        results = as_results(detections, truth, objects=False, **ids)
        run = _Run(results, truth, folder, cache, device, bars)
        return run.with_features(detector, loaded, settings, changes)


def _head(head: Any) -> Head:
    from iou_refiner.head.checkpoint import load_head

    head = getattr(head, "head", head)
    return load_head(fspath(head)) if isinstance(head, (str, PathLike)) else head


def _alone(
    detections: Any,
    head: SiblingHead,
    annotations: Any,
    settings: StageSettings | None,
    changes: Mapping[str, Any],
    progress: bool | Progress,
    ids: dict[str, Any],
) -> Rescored:
    """By the siblings of each candidate: no detector, no images."""
    from iou_refiner.rescoring import check_saved, rescore_saved, stage_without_detector

    with data_of({"images": [], "annotations": [], "categories": []} if annotations is None else annotations, None) as (
        truth, _,
    ):  # fmt: skip
        known = annotations is not None
        results = as_results(detections, truth, objects=False, **{**ids, "check": ids["check"] and known})
    if ids["check"]:
        check_saved(head, results, "These candidates")
    stage = stage_without_detector(head, settings, **changes)
    order = tuple(results.by_image())
    with watched(progress) as (bars, _):
        return _collected(rescore_saved(stage, results), stage, order, bars)


@dataclass(frozen=True)
class _Run:
    """What a rescoring with features reads."""

    results: Results
    truth: GroundTruth
    folder: Path
    cache: Any
    device: Any
    bars: Progress

    def with_features(
        self, detector: Any, head: IoUHead, settings: StageSettings | None, changes: Mapping[str, Any]
    ) -> Rescored:
        """By what the detector's features say of each candidate."""
        from iou_refiner.detector.sources import feature_source
        from iou_refiner.refiner import stage_on
        from iou_refiner.rescoring import rescore as rescored

        with_records = self.results.by_image()
        used = [image for image in self.truth.images if image.id in with_records]
        check_images_exist(self.folder, used)
        adapter = as_detector(detector, as_device(self.device, detector))
        stage = stage_on(adapter, head, settings, **changes)
        source = feature_source(adapter, self.folder, self.cache)
        parts = rescored(source, adapter.category_ids, stage, self.results, self.truth, used)
        return _collected(parts, stage, tuple(image.id for image in used), self.bars)


def _collected(parts: Iterable[Results], stage: Any, order: tuple[int, ...], bars: Progress) -> Rescored:
    better = []
    bars("rescoring", 0, len(order))
    for done, part in enumerate(parts, 1):
        better.append(part)
        bars("rescoring", done, len(order))
    return Rescored(Results.concat(better), stage.summary, stage.settings, order)
