"""``iou-refiner rescore``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from iou_refiner.cli.console import Console
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.inputs import check_images, detector_on, results_file
from iou_refiner.cli.options import (
    Annotation,
    Cache,
    Detector,
    Images,
    NoCheck,
    Output,
    Overwrite,
    Quiet,
    after_interrupt,
    optional,
)
from iou_refiner.stage.settings import StageSettings

if TYPE_CHECKING:
    from iou_refiner.coco import Results
    from iou_refiner.detector.adapter import Adapter
    from iou_refiner.head.iou_head import IoUHead
    from iou_refiner.stage.stage import Stage

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
    check: NoCheck = True,
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
    output = results_file(output, overwrite, inputs=[detections, ann, head], detector=detector)
    from iou_refiner.coco import read_images, read_results, write_parts
    from iou_refiner.detector.sources import feature_source
    from iou_refiner.rescoring import rescore as rescored

    iou_head, settings = _read_head(head, preset, changes, console)
    results, ground_truth = read_results(detections), read_images(ann)
    if check:
        from iou_refiner.validation.validate import check_before

        check_before(results, ground_truth, detections)
    used = results.by_image()
    check_images(images, [image for image in ground_truth.images if image.id in used], outputs=[output])
    adapter = detector_on(detector, console)
    stage = _stage(iou_head, settings, adapter)
    _note_suppressed(detections, results, stage, console)
    console.after_interrupt = after_interrupt(output, cache)
    source = feature_source(adapter, images, cache)
    parts = rescored(source, adapter.category_ids, stage, results, ground_truth)
    count = write_parts(output, console.track(parts, len(used), "rescoring"))
    console.save_config(output)
    _note_untrained(stage, console)
    for note in source.notes():
        console.note(note)
    console.data(stage.summary.to_dict() | {"records": count, "output": str(output)}, f"{output}: {stage.summary}")
    return OK


def _read_head(head: Path, preset: str, changes: Any, console: Console) -> tuple[IoUHead, StageSettings]:
    """The head, and what the stage is to do with it, both checked before anything else is read."""
    from iou_refiner.checks import DataError
    from iou_refiner.head.checkpoint import load_head
    from iou_refiner.stage.stage import Stage

    iou_head = load_head(head)
    with console.usage():
        try:
            return iou_head, Stage(iou_head, _PRESETS[preset], **asdict(changes)).settings
        except DataError as error:
            raise DataError(f"{head}: {error} Or name a --preset.") from None


def _stage(head: IoUHead, settings: StageSettings, adapter: Adapter) -> Stage:
    from iou_refiner.refiner import check_head
    from iou_refiner.stage.stage import Stage

    check_head(head, adapter)
    return Stage(head.to(adapter.device), settings, own_threshold=adapter.nms_threshold)


def _note_suppressed(path: Path, results: Results, stage: Stage, console: Console) -> None:
    from iou_refiner.validation.nms_trace import suppressed_at

    threshold = suppressed_at(results)
    if stage.settings.nms == "iou_guided" and threshold is not None:
        console.note(
            f"{path} looks already NMS-ed at about {threshold:.2f}: IoU-guided NMS can remove little more, only "
            "rescoring and refinement will act. To save boxes before NMS: iou-refiner dump"
        )


def _note_untrained(stage: Stage, console: Console) -> None:
    summary = stage.summary
    if summary.untrained:
        from iou_refiner.refiner import names

        trained = names(stage.head.metadata.categories)
        console.note(
            f"{summary.untrained:,} of {summary.candidates:,} records are of categories that the head was not trained "
            f"on (it was on {trained}): they kept the detector's own suppression, box and score. To apply the head to "
            "them too: --all-categories"
        )
