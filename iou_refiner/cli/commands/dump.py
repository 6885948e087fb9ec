"""``iou-refiner dump``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.console import new_file
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.options import Annotation, Cache, Detector, Images, Output, Overwrite, Quiet


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
    output = new_file(output, overwrite, inputs=[ann])
    from iou_refiner.coco import Results, read_ground_truth, write_results
    from iou_refiner.detector.registry import detector_from_spec
    from iou_refiner.detector.sources import feature_source
    from iou_refiner.rescoring import dump_candidates

    ground_truth = read_ground_truth(ann)
    adapter = detector_from_spec(detector).to(console.torch_device())
    source = feature_source(adapter, images, cache)
    parts = dump_candidates(source, adapter.category_ids, ground_truth, top=top)
    results = Results.concat(console.track(parts, len(ground_truth.images), "detecting"))
    write_results(output, results, image_order=[image.id for image in ground_truth.images])
    console.save_config(output)
    console.data({"records": len(results), "output": str(output)}, f"{len(results):,} candidates in {output}")
    return OK
