"""``iou-refiner rescore``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter

from iou_refiner.cli.console import Console, UsageError
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
    optional,
)
from iou_refiner.cli.resuming import resuming, run_identity
from iou_refiner.cli.without_detector import rescore_without_detector
from iou_refiner.stage.settings import StageSettings

if TYPE_CHECKING:
    from iou_refiner.coco import Results
    from iou_refiner.head.checkpoint import Head
    from iou_refiner.head.iou_head import IoUHead
    from iou_refiner.stage.stage import Stage

StageChanges: Any = optional(StageSettings)
_PRESETS = {"recommended": None, "paper": StageSettings.paper(), "detector_only": StageSettings.detector_only()}


def rescore(
    detections: Path,
    *,
    head: Annotated[Path, Parameter(help="Head made by `train`.")],
    output: Output,
    detector: Detector | None = None,
    ann: Annotation | None = None,
    images: Images | None = None,
    preset: Literal["recommended", "paper", "detector_only"] = "recommended",
    changes: Annotated[StageChanges, Parameter(name="*", group="Stage")] = StageChanges(),  # noqa: B008 - frozen
    cache: Cache = None,
    check: NoCheck = True,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Rescore, suppress and refine saved COCO results with a trained head.

    A head that reads features needs --detector, --ann and --images. One trained by `train --detections` needs none of
    them. A run that was stopped goes on where it was if the same command is given again.

    Parameters
    ----------
    detections
        COCO results, best before suppression (see `dump`).
    preset
        Settings of the stage that are not given below: those that measured best when the head was trained with
        --val-ann (see `info`), the paper's own pipeline, or what the detector does by itself.
    """
    inputs = [detections, head, *([] if ann is None else [ann])]
    output = results_file(output, overwrite, inputs=inputs, detector=detector or "")
    from iou_refiner.head.sibling_head import SiblingHead

    loaded, settings = _read_head(head, preset, changes, console)
    if isinstance(loaded, SiblingHead):
        return rescore_without_detector(detections, output, loaded, settings, ann=ann, check=check, console=console)
    if detector is None or ann is None or images is None:
        raise UsageError(
            f"{head} reads the features of a detector: --detector, --ann and --images are needed. A head that needs "
            "none of them: iou-refiner train --detections"
        )
    needs = _Inputs(detections, ann, images, head, detector)
    return _rescore_with_detector(needs, loaded, settings, output, cache=cache, check=check, console=console)


class _Inputs(NamedTuple):
    """What the rescoring with a detector reads."""

    detections: Path
    ann: Path
    images: Path
    head: Path
    detector: str


def _rescore_with_detector(
    inputs: _Inputs,
    head: IoUHead,
    settings: StageSettings,
    output: Path,
    *,
    cache: Path | None,
    check: bool,
    console: Console,
) -> int:
    from iou_refiner.coco import read_images, read_results
    from iou_refiner.detector.sources import feature_source
    from iou_refiner.refiner import stage_on
    from iou_refiner.rescoring import rescore as rescored

    results, ground_truth = read_results(inputs.detections), read_images(inputs.ann)
    if check:
        from iou_refiner.validation.validate import check_before

        check_before(results, ground_truth, inputs.detections)
    with_records = results.by_image()
    used = [image for image in ground_truth.images if image.id in with_records]
    check_images(inputs.images, used, outputs=[output])
    adapter = detector_on(inputs.detector, console)
    stage = stage_on(adapter, head, settings)
    _note_suppressed(inputs.detections, results, stage, console)
    identity = run_identity(
        adapter, inputs.detector, used, console, cached=cache is not None, command="rescore",
        detections=inputs.detections, ann=inputs.ann, head=inputs.head,
        stage=[asdict(stage.settings), stage.own_threshold],
    )  # fmt: skip
    source = feature_source(adapter, inputs.images, cache)
    with resuming(output, inputs.images, used, identity, asdict(stage.summary), console, cache) as partial:
        stage.summary = replace(stage.summary, **partial.counts)
        parts = rescored(source, adapter.category_ids, stage, results, ground_truth, partial.todo)
        for part in console.track(parts, len(partial.todo), "rescoring"):
            partial.add(part, asdict(stage.summary))
    console.save_config(output)
    _note_untrained(stage, console)
    for note in source.notes():
        console.note(note)
    console.data(
        stage.summary.to_dict() | {"records": partial.records, "output": str(output)}, f"{output}: {stage.summary}"
    )
    return OK


def _read_head(head: Path, preset: str, changes: Any, console: Console) -> tuple[Head, StageSettings]:
    """The head, and what the stage is to do with it, both checked before anything else is read."""
    from iou_refiner.checks import DataError
    from iou_refiner.head.checkpoint import load_head
    from iou_refiner.stage.stage import Stage

    loaded = load_head(head)
    with console.usage():
        try:
            return loaded, Stage(loaded, _PRESETS[preset], **asdict(changes)).settings
        except DataError as error:
            raise DataError(f"{head}: {error} Or name a --preset.") from None


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
