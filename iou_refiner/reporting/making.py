"""A report from two sets of detections: measured, drawn, written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iou_refiner.checks import require, shown
from iou_refiner.coco import GroundTruth, Results, read_ground_truth, read_results
from iou_refiner.evaluation.tables import Table
from iou_refiner.files import write_whole
from iou_refiner.progress import Progress, no_progress
from iou_refiner.reporting.facts import Facts, measure
from iou_refiner.reporting.gallery import Galleries, make_galleries
from iou_refiner.reporting.page import render


@dataclass(frozen=True, eq=False, repr=False)
class Report(Table):
    """A report on two sets of detections of the same images.

    Args:
        facts: what it states.
        galleries: the images that changed most; None where no images were given.
        html: the page, one self-contained file.
    """

    facts: Facts
    galleries: Galleries | None
    html: str

    @property
    def caption(self) -> str:
        """The gain, and whether to trust it."""
        return f"{self.facts.verdict.gain}. {self.facts.verdict.trust}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return self.facts.comparison.columns

    def rows(self) -> list[tuple[str, ...]]:
        """A row per metric, as of the comparison."""
        return list(self.facts.comparison.rows())

    def save(self, path: str | Path) -> None:
        """Write the page, beside and renamed; what stands there is replaced.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        write_whole(Path(path), self.html.encode())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, fractions in [0, 1]; None for what cannot be had."""
        return {**self.facts.to_dict(), "galleries": self.galleries and self.galleries.to_dict()}


def make_report(
    before: Results | str | Path,
    after: Results | str | Path,
    ground_truth: GroundTruth | str | Path,
    images: str | Path | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    max_dets: int = 100,
    names: tuple[str, str] | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Compare two sets of detections of the same images on one page.

    Args:
        before, after: detections, or the path of COCO results.
        ground_truth: the annotation, or its path.
        images: folder of the images; without it there are no galleries.
        resamples, seed, max_dets: as :func:`iou_refiner.evaluation.bootstrap.compare`.
        names: of the two sides on the page. Default: the names of their files.
        progress: see :class:`Progress`.

    Raises:
        DataError: a file breaks its format, the detections are of other images or categories, or an image that would
            be shown cannot be read.
        MissingPackageError: jinja2 is missing, or Pillow where there are images.
        ValueError: as :func:`iou_refiner.evaluation.bootstrap.compare`.
    """
    require("jinja2", extra="report", purpose="The report")  # before minutes are spent on measuring
    names = names or (_name(before, "before"), _name(after, "after"))
    old, new = (side if isinstance(side, Results) else read_results(side) for side in (before, after))
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else read_ground_truth(ground_truth)
    facts = measure(old, new, truth, resamples=resamples, seed=seed, max_dets=max_dets, progress=progress)
    galleries = None if images is None else make_galleries(facts, old, new, truth, images, progress)
    return Report(facts, galleries, render(facts, galleries, truth, (shown(names[0]), shown(names[1]))))


def _name(side: Results | str | Path, otherwise: str) -> str:
    """What a side is called on the page."""
    return otherwise if isinstance(side, Results) else Path(side).name
