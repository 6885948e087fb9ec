"""``iou-refiner dump``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.inputs import check_images, detector_on, results_file
from iou_refiner.cli.options import (
    Annotation,
    Cache,
    Detector,
    Images,
    Output,
    Overwrite,
    Quiet,
    after_interrupt,
)


def dump(
    *,
    detector: Detector,
    ann: Annotation,
    images: Images,
    output: Output,
    top: Annotated[int, Parameter(validator=Number(gte=1))] = 1000,
    cache: Cache = None,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Save a detector's candidates before suppression, which is what IoU-guided NMS needs.

    Parameters
    ----------
    top
        Candidates kept per image, best scores first.
    """
    output = results_file(output, overwrite, inputs=[ann], detector=detector)
    from iou_refiner.coco import read_images, write_parts
    from iou_refiner.detector.sources import feature_source
    from iou_refiner.rescoring import dump_candidates

    ground_truth = read_images(ann)
    check_images(images, ground_truth.images, outputs=[output])
    adapter = detector_on(detector, console)
    console.after_interrupt = after_interrupt(output, cache)
    source = feature_source(adapter, images, cache)
    parts = dump_candidates(source, adapter.category_ids, ground_truth, top=top)
    count = write_parts(output, console.track(parts, len(ground_truth.images), "detecting"))
    console.save_config(output)
    for note in source.notes():
        console.note(note)
    console.data({"records": count, "output": str(output)}, f"{count:,} candidates in {output}")
    return OK
