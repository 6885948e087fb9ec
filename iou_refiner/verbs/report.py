"""``iou_refiner.report``: the page that ``iou-refiner report`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from iou_refiner.checks import require
from iou_refiner.progress import Progress
from iou_refiner.reporting import Report, make_report
from iou_refiner.verbs.inputs import as_results, data_of, watched


def report(
    before: Any,
    after: Any,
    annotations: Any,
    images: str | PathLike[str] | None = None,
    *,
    output: str | PathLike[str] | None = None,
    bootstrap: int = 1000,
    max_dets: int = 100,
    seed: int = 0,
    image_ids: str = "annotation",
    category_ids: str | Mapping[int, int] = "annotation",
    check: bool = True,
    progress: bool | Progress = True,
) -> Report:
    """One page on before and after: the gain, whether to trust it, errors, calibration, the images that changed most.

    Args:
        before, after: detections in any form that :func:`iou_refiner.evaluate` takes.
        annotations: likewise.
        images: folder of the images; without it the page has no pictures. A Dataset has its own.
        output: HTML file to write, whatever stands there; None to write none: ``report(...).save(path)``.
        bootstrap, max_dets, seed, image_ids, category_ids, check: as of :func:`iou_refiner.evaluate`.
        progress: bars for True, nothing for False, or what is called as work goes on.

    Returns:
        The report: ``html``, ``facts``, ``save``, ``to_dict``. It prints as its verdict and a table.

    Raises:
        DataError, TypeError: as :func:`iou_refiner.evaluate`; an image that would be shown cannot be read.
        MissingPackageError: jinja2 is missing, or Pillow where there are images.
    """
    require("jinja2", extra="report", purpose="The report")  # before anything is read
    options: dict[str, Any] = {"image_ids": image_ids, "category_ids": category_ids, "check": check}
    with data_of(annotations, images) as (ground_truth, folder), watched(progress) as (bars, _):
        sides = [
            as_results(side, ground_truth, name=name, **options)
            for name, side in (("before", before), ("after", after))
        ]
        made = make_report(
            sides[0], sides[1], ground_truth, folder, names=(_name(before, "before"), _name(after, "after")),
            resamples=bootstrap, seed=seed, max_dets=max_dets, progress=bars,
        )  # fmt: skip
    if output is not None:
        made.save(fspath(output))
    return made


def _name(side: Any, otherwise: str) -> str:
    """What a side is called on the page."""
    return Path(side).name if isinstance(side, (str, PathLike)) else otherwise
