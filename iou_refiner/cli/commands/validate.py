"""``iou-refiner validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.exit_codes import INVALID_DATA, OK
from iou_refiner.cli.options import Quiet


def validate(
    detections: Path,
    *,
    ann: Annotated[Path | None, Parameter(name=["--ann"], help="COCO annotation the results belong to.")] = None,
    max_examples: Annotated[int, Parameter(validator=Number(gte=0))] = 5,
    console: Quiet,
) -> int:
    """Check a COCO results file: every fault with its record, its cause and the cure.

    Parameters
    ----------
    detections
        COCO results, .json or .json.gz.
    max_examples
        Examples shown of each fault.
    """
    from iou_refiner.validation.findings import format_report
    from iou_refiner.validation.validate import validate as check

    report = check(detections, ann, max_examples=max_examples)
    console.data(report.to_dict(), format_report(report))
    return OK if report.ok else INVALID_DATA
