"""`train --detections` and `rescore` with a head without features: saved candidates are all that they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iou_refiner.cli.console import Console
from iou_refiner.cli.exit_codes import OK

if TYPE_CHECKING:
    from iou_refiner.coco import GroundTruth, Results
    from iou_refiner.head.sibling_head import SiblingHead
    from iou_refiner.stage.settings import StageSettings


def train_without_detector(
    head: Path,
    train_files: tuple[Path, Path],
    val_files: tuple[Path, Path] | None,
    *,
    check: bool,
    console: Console,
) -> int:
    """Train a head without features.

    Args:
        head: the file to write, in a folder that is made if it is missing.
        train_files, val_files: candidates and annotation.
        check: refuse files with errors, and boxes after suppression.
        console: of the command.
    """
    from iou_refiner.training.from_candidates import train_from_candidates

    train_data = _read(*train_files, check=check)
    val_data = None if val_files is None else _read(*val_files, check=check)
    head.parent.mkdir(parents=True, exist_ok=True)
    console.save_config(head)
    console.after_interrupt = "Nothing was written: this training takes minutes, and starts anew."
    with console.progress() as progress:
        history = train_from_candidates(
            train_data, val_data, output_dir=head.parent, detector_name=train_files[0].name,
            seed=console.seed, check=check, note=console.note, progress=progress,
        )  # fmt: skip
    last = history[-1]
    text = f"{head}: " + ", ".join(f"{name} {value:.4g}" for name, value in last.items())
    console.data(last | {"output": str(head.parent)}, text)
    return OK


def _read(detections: Path, ann: Path, *, check: bool) -> tuple[Results, GroundTruth]:
    from iou_refiner.coco import read_ground_truth, read_results

    results, ground_truth = read_results(detections), read_ground_truth(ann)
    if check:
        from iou_refiner.validation.validate import check_before

        check_before(results, ground_truth, detections, ann=ann)
    return results, ground_truth


def rescore_without_detector(
    detections: Path,
    output: Path,
    head: SiblingHead,
    settings: StageSettings,
    *,
    ann: Path | None,
    check: bool,
    console: Console,
) -> int:
    """Rescore saved candidates by their siblings.

    Args:
        detections: COCO results from before suppression.
        output: the file to write.
        head, settings: what to do with them.
        ann: annotation to check the records against, if there is one.
        check: refuse records with errors, and candidates unlike those that the head was trained on.
        console: of the command.
    """
    from iou_refiner.coco import Results, read_images, read_results, write_results
    from iou_refiner.rescoring import check_saved, rescore_saved, stage_without_detector

    results = read_results(detections)
    if check and ann is not None:
        from iou_refiner.validation.validate import check_before

        check_before(results, read_images(ann), detections)
    if check:
        check_saved(head, results, str(detections))
    stage = stage_without_detector(head, settings)
    console.after_interrupt = f"{output} was not written, and nothing is kept: this takes a minute for a million boxes."
    parts = rescore_saved(stage, results)
    images = list(results.by_image())
    better = Results.concat(console.track(parts, len(images), "rescoring"))
    write_results(output, better, image_order=images)
    console.save_config(output)
    summary = stage.summary
    console.data(summary.to_dict() | {"records": len(better), "output": str(output)}, f"{output}: {summary}")
    return OK
