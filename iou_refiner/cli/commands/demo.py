"""``iou-refiner demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.options import Quiet


def demo(*, output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo"), console: Quiet) -> int:
    """Train a small detector and its IoU head on made images, here and now, and show before and after.

    Parameters
    ----------
    output
        Folder for images, weights, results and the picture.
    """
    from iou_refiner.demo import run_demo
    from iou_refiner.demo.run import report_command

    with console.progress() as progress:
        result = run_demo(output, seed=console.seed, progress=progress)
    if not console.as_json:
        console.print(result.caption)
    console.table(result.columns, result.rows(), result.to_dict())
    console.note(f"Images, weights, results and the picture before_after.png are in {output}")
    console.note(f"See the gain, the errors and the images that changed most: {report_command(output)}")
    return OK
