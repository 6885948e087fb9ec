"""``iou-refiner rescore``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from iou_refiner.cli.console import new_file
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.options import Annotation, Cache, Detector, Images, Output, Overwrite, Quiet, optional
from iou_refiner.stage.settings import StageSettings

StageChanges: Any = optional(StageSettings)
_PRESETS = {"recommended": None, "paper": StageSettings.paper(), "detector_only": StageSettings.detector_only()}


def rescore(
    detections: Path,
    *,
    head: Annotated[Path, Parameter(help="Head made by `train`.")],
    detector: Detector,
    ann: Annotation,
    images: Images,
    output: Output,
    preset: Literal["recommended", "paper", "detector_only"] = "recommended",
    changes: Annotated[StageChanges, Parameter(name="*", group="Stage")] = StageChanges(),  # noqa: B008 - frozen
    cache: Cache = None,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Rescore, suppress and refine saved COCO results with the detector's features and a trained head.

    Parameters
    ----------
    detections
        COCO results, best before suppression (see `dump`).
    preset
        Settings of the stage that are not given below: those that measured best when the head was trained with
        --val-ann (see `info`), the paper's own pipeline, or what the detector does by itself.
    """
    output = new_file(output, overwrite, inputs=[detections, ann, head])
    from iou_refiner.coco import Results, read_ground_truth, read_results, write_results
    from iou_refiner.detector.registry import detector_from_spec
    from iou_refiner.detector.sources import feature_source
    from iou_refiner.head.checkpoint import load_head
    from iou_refiner.refiner import check_head
    from iou_refiner.rescoring import rescore as rescored
    from iou_refiner.stage.stage import Stage
    from iou_refiner.validation.nms_trace import suppressed_at

    iou_head = load_head(head)
    with console.usage():
        stage = Stage(iou_head, _PRESETS[preset], **asdict(changes))
    results, ground_truth = read_results(detections), read_ground_truth(ann)
    threshold = suppressed_at(results)
    if stage.settings.nms == "iou_guided" and threshold is not None:
        console.note(
            f"{detections} looks already NMS-ed at about {threshold:.2f}: IoU-guided NMS can remove little more, only "
            "rescoring and refinement will act. To save boxes before NMS: iou-refiner dump"
        )
    adapter = detector_from_spec(detector).to(console.torch_device())
    check_head(iou_head, adapter)
    iou_head.to(adapter.device)
    source = feature_source(adapter, images, cache)
    parts = rescored(source, adapter.category_ids, stage, results, ground_truth)
    better = Results.concat(console.track(parts, len(results.by_image()), "rescoring"))
    write_results(output, better, image_order=[image.id for image in ground_truth.images])
    console.save_config(output)
    console.data(vars(stage.summary) | {"output": str(output)}, f"{output}: {stage.summary}")
    return OK
