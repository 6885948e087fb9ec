"""``iou-refiner validate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.console import Console, UsageError, new_file
from iou_refiner.cli.exit_codes import INVALID_DATA, OK
from iou_refiner.cli.options import Overwrite, Quiet


def validate(
    detections: Path | None = None,
    *,
    ann: Annotated[Path | None, Parameter(name=["--ann"], help="COCO annotation the results belong to.")] = None,
    fix: Annotated[
        Path | None, Parameter(help="Write a repaired copy here: of the results, or of the annotation alone.")
    ] = None,
    max_examples: Annotated[int, Parameter(validator=Number(gte=0))] = 5,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Check COCO results, their annotation, or both: every fault with its record, its cause and the cure.

    With --fix, what surely can be repaired is, each repair is listed, and the exit code is that of the copy.

    Parameters
    ----------
    detections
        COCO results, .json or .json.gz; without them, the annotation alone is checked.
    max_examples
        Examples shown of each fault and of each kind of repair.
    """
    from iou_refiner.validation.findings import format_report
    from iou_refiner.validation.validate import validate as check

    if detections is None and ann is None:
        raise UsageError("Nothing to check: give results, --ann with their annotation, or both.")
    if fix is not None:
        return _fix(detections, ann, fix, overwrite, max_examples, console)
    report = check(detections, ann, max_examples=max_examples)
    console.data(report.to_dict(), format_report(report))
    return OK if report.ok else INVALID_DATA


def _fix(
    detections: Path | None, ann: Path | None, output: Path, overwrite: bool, max_examples: int, console: Console
) -> int:
    from iou_refiner.checks import DataError
    from iou_refiner.coco import read_images
    from iou_refiner.validation.findings import format_report
    from iou_refiner.validation.repair import format_repairs, repair_results
    from iou_refiner.validation.repair_annotation import repair_annotation
    from iou_refiner.validation.validate import validate as check

    new_file(output, overwrite, inputs=[path for path in (detections, ann) if path is not None])
    if detections is None:
        assert ann is not None
        repairs = repair_annotation(ann, output)
        report = check(None, output, max_examples=max_examples)
    else:
        try:
            truth = None if ann is None else read_images(ann)
        except DataError:  # what is wrong with the annotation stands in the report
            truth = None
        repairs = repair_results(detections, output, truth)
        report = check(output, ann, max_examples=max_examples)
    text = "\n".join(filter(None, (format_repairs(repairs, max_examples), f"{output}: {format_report(report)}")))
    machine = {"output": str(output), "repairs": [asdict(repair) for repair in repairs], **report.to_dict()}
    console.data(machine, text)
    return OK if report.ok else INVALID_DATA
