"""Options that several commands share, and how dataclasses of settings become options."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

from cyclopts import Parameter

from iou_refiner.cli.console import Console

Detector = Annotated[
    str,
    Parameter(
        help="adapter:name, package.module:function or file.py:function[:argument], for example onnx:yolox.onnx."
    ),
]
Annotation = Annotated[Path, Parameter(name=["--ann"], help="COCO annotation of the images.")]
Images = Annotated[Path, Parameter(help="Folder of the images.")]
Cache = Annotated[Path | None, Parameter(help="Keep and reuse features in this folder (float16).")]
Output = Annotated[Path, Parameter(name=["--output", "-o"], help="COCO results to write, .json or .json.gz.")]
Overwrite = Annotated[bool, Parameter(negative=(), help="Replace an output that exists.")]
NoCheck = Annotated[
    bool,
    Parameter(
        name="--check", negative="--no-check", show_default=False,
        help="Refuse results with errors, as `validate` finds them, before the detector runs; default.",
    ),
]  # fmt: skip
Quiet = Annotated[Console, Parameter(parse=False)]


def optional(settings: type) -> Any:
    """A dataclass of the same fields, each of which may be left out (None): options that only override.

    Args:
        settings: a dataclass whose docstring describes its fields under ``Args:``.
    """
    hints = get_type_hints(settings)
    columns = [(field.name, Optional[hints[field.name]], None) for field in fields(settings)]  # noqa: UP045 - at runtime
    made = make_dataclass(f"{settings.__name__}Changes", columns, frozen=True)
    made.__doc__, made.__module__ = settings.__doc__, __name__  # where the options get their help and their types from
    return made
