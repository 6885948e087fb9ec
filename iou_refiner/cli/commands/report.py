"""``iou-refiner report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.console import new_file
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.options import Annotation, NoCheck, Overwrite, Quiet

_MOST_RESAMPLES = 100_000  # as in evaluation.bootstrap, which --help does not wait for


def report(
    before: Path,
    after: Path,
    *,
    ann: Annotation,
    images: Annotated[Path | None, Parameter(help="Folder of the images; without it there are no pictures.")] = None,
    output: Annotated[Path, Parameter(name=["--output", "-o"], help="HTML file to write.")] = Path("report.html"),
    bootstrap: Annotated[int, Parameter(validator=Number(gte=0, lte=_MOST_RESAMPLES))] = 1000,
    max_dets: Annotated[int, Parameter(validator=Number(gte=1, lte=1_000_000))] = 100,
    check: NoCheck = True,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """One page on before and after: the gain, whether to trust it, errors, calibration, the images that changed most.

    Parameters
    ----------
    before
        COCO results before, .json or .json.gz.
    after
        COCO results after.
    bootstrap
        Resamples of the images for the intervals, at most 100,000.
    max_dets
        Detections that count per image and category, as in pycocotools.
    """
    new_file(output, overwrite, inputs=(before, after, ann))
    from iou_refiner.checks import require
    from iou_refiner.coco import read_ground_truth, read_results
    from iou_refiner.report import make_report
    from iou_refiner.validation.validate import check_before

    require("jinja2", extra="report", purpose="The report")  # before anything is read
    ground_truth = read_ground_truth(ann)
    sides = [read_results(path) for path in (before, after)]
    if check:
        for path, results in zip((before, after), sides, strict=True):
            check_before(results, ground_truth, path, ann=ann)
    with console.progress() as progress:
        made = make_report(
            sides[0], sides[1], ground_truth, images, names=(before.name, after.name),
            resamples=bootstrap, seed=console.seed, max_dets=max_dets, progress=progress,
        )  # fmt: skip
    made.save(output)
    verdict = made.facts.verdict
    console.data(made.to_dict(), f"{verdict.gain}. {verdict.trust}")
    if images is None:
        console.note("Without --images the page has no pictures.")
    console.note(f"{output}: {output.stat().st_size / 1e6:.1f} MB, one file, to open in any browser.")
    return OK
