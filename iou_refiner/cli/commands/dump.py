"""``iou-refiner dump``."""

from __future__ import annotations

from dataclasses import asdict
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
)
from iou_refiner.cli.resuming import resuming, run_identity


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

    A run that was stopped goes on where it was if the same command is given again.

    Parameters
    ----------
    top
        Candidates kept per image, best scores first.
    """
    output = results_file(output, overwrite, inputs=[ann], detector=detector)
    from iou_refiner.coco import read_images
    from iou_refiner.detector.sources import feature_source
    from iou_refiner.rescoring import DumpSummary, dump_candidates

    ground_truth = read_images(ann)
    check_images(images, ground_truth.images, outputs=[output])
    adapter = detector_on(detector, console)
    todo = ground_truth.images
    identity = run_identity(
        adapter, detector, todo, console, cached=cache is not None, command="dump", ann=ann, top=top
    )
    source = feature_source(adapter, images, cache)
    with resuming(output, images, todo, identity, asdict(DumpSummary()), console, cache) as partial:
        summary = DumpSummary(**partial.counts)
        parts = dump_candidates(
            source, adapter.category_ids, ground_truth, top=top, images=partial.todo, summary=summary
        )
        for part in console.track(parts, len(partial.todo), "detecting"):
            partial.add(part, asdict(summary))
    console.save_config(output)
    for note in source.notes():
        console.note(note)
    console.data({"records": partial.records, "output": str(output)} | summary.to_dict(), f"{output}: {summary}")
    return OK
