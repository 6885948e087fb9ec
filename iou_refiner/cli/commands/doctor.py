"""``iou-refiner doctor``."""

from __future__ import annotations

from iou_refiner.cli.exit_codes import OK, UNEXPECTED
from iou_refiner.cli.options import Quiet


def doctor(*, console: Quiet) -> int:
    """Say what works here: versions, devices, the pooling kernels, the adapters."""
    from iou_refiner.cli.doctor import examine

    report = examine()
    console.data(report.to_dict(), report.text())
    return OK if report.ok else UNEXPECTED
