"""``iou-refiner report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.console import new_file
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.inputs import CategoryIds, ImageIds, category_numbers
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
    image_ids: ImageIds = "annotation",
    category_ids: CategoryIds = "annotation",
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
    from iou_refiner.verbs.report import report as make

    with console.progress() as progress:
        made = make(
            before, after, ann, images, bootstrap=bootstrap, seed=console.seed, max_dets=max_dets, check=check,
            image_ids=image_ids, category_ids=category_numbers(category_ids), progress=progress,
        )  # fmt: skip
    made.save(output)
    console.data(made.to_dict(), made.caption)
    if images is None:
        console.note("Without --images the page has no pictures.")
    console.note(f"{output}: {output.stat().st_size / 1e6:.1f} MB, one file, to open in any browser.")
    return OK
