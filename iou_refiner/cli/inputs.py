"""What a command is given and what it may replace: outputs never take the place of an input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from iou_refiner.checks import did_you_mean
from iou_refiner.cli.console import Console, UsageError, new_file

if TYPE_CHECKING:
    from iou_refiner.coco import Image
    from iou_refiner.detector.adapter import Adapter

ImageIds = Annotated[
    Literal["annotation", "file_name"],
    Parameter(help="What image_id is in the results: an id of the annotation, or the name or number of an image file."),
]
CategoryIds = Annotated[
    str,
    Parameter(
        help="What category_id is in the results: annotation (its ids), from_0 or from_1 (counted in the order of its "
        "ids), or pairs THEIRS=OURS with commas: 0=1,1=3."
    ),
]


def category_numbers(text: str) -> str | dict[int, int]:
    """What ``--category-ids`` says.

    Raises:
        UsageError: it is neither a choice nor pairs of numbers.
    """
    choices = ("annotation", "from_0", "from_1")
    if text in choices:
        return text
    try:
        return {int(theirs): int(ours) for theirs, ours in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise UsageError(
            f"--category-ids {text!r} must be one of {', '.join(choices)}, or pairs of numbers such as 0=1,1=3."
            f"{did_you_mean(text, choices)}"
        ) from None


def results_file(path: Path, overwrite: bool, *, inputs: Iterable[Path], detector: str) -> Path:
    """The path of a results file to write, once it is sure that no file is lost by it or by what lies beside it."""
    inputs = [*inputs, *detector_files(detector)]
    check_apart([path, *(path.with_name(path.name + more) for more in (".config.json", ".partial"))], inputs)
    new_file(path, overwrite, inputs=inputs)
    if not path.name.endswith((".json", ".json.gz")):
        raise UsageError(f"The output {path} must end in .json or .json.gz, as COCO results do. Name such a file.")
    if path.is_dir():
        raise UsageError(f"The output {path} is a folder. Name a file in it.")
    check_writable(path.parent)
    return path


def check_writable(folder: Path) -> None:
    """Raise UsageError unless a folder can be written in, or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UsageError(f"{there} is a file, and a folder is needed for the output. Name another folder.")
    if not os.access(there, os.W_OK):
        raise UsageError(f"Nothing may be written in {there}. Change its permissions, or name another folder.")


def check_apart(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise UsageError if one of the outputs is the file of one of the inputs."""
    inputs = list(inputs)
    for output in outputs:
        for source in inputs:
            if os.path.exists(output) and os.path.exists(source) and output.samefile(source):
                raise UsageError(
                    f"The output {output} is also an input. Inputs are never overwritten; name another file."
                )


def detector_files(spec: str) -> Iterator[Path]:
    """The files that a ``--detector`` names, code and weights: what lies between any two of its colons."""
    parts = spec.split(":")
    for start, end in combinations(range(len(parts) + 1), 2):
        name = ":".join(parts[start:end])
        if name and os.path.isfile(name):
            yield Path(name)
            layout = Path(name).with_suffix(".layout.json")
            if layout.is_file():
                yield layout


def check_images(folder: Path, images: Iterable[Image], *, outputs: Iterable[Path] = ()) -> None:
    """Refuse images that are not there, and outputs that are one of them, before anything runs."""
    from iou_refiner.detector.images import ImageFolder
    from iou_refiner.verbs.inputs import check_images_exist

    if not folder.is_dir():
        raise UsageError(f"--images {folder}: no such folder. Name the folder that the annotation's file names are in.")
    pictures, images = ImageFolder(folder), list(images)
    check_apart([path for path in outputs if path.exists()], map(pictures.path, images) if any_exist(outputs) else ())
    check_images_exist(folder, images)


def any_exist(paths: Iterable[Path]) -> bool:
    """Whether there is anything at one of these paths."""
    return any(os.path.exists(path) for path in paths)


def detector_on(spec: str, console: Console) -> Adapter:
    """The detector that ``--detector`` names, on the device asked for, which is checked first."""
    device = console.torch_device()
    from iou_refiner.detector.registry import detector_from_spec

    adapter = detector_from_spec(spec)
    with console.usage():
        return adapter.to(device)
