"""What the functions are given, in whatever form it is at hand, as what the rest of the package works on."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Image, Results, read_ground_truth
from iou_refiner.coco.data import GroundTruthFile
from iou_refiner.coco.ground_truth import to_ground_truth
from iou_refiner.connectors.data_set import results_of_images, results_of_records
from iou_refiner.connectors.ids import read_foreign_results
from iou_refiner.progress import Progress, no_note, no_progress, progress_bars
from iou_refiner.validation.validate import check_before

if TYPE_CHECKING:
    import torch

    from iou_refiner.detector.adapter import Adapter


def as_results(
    detections: Any,
    ground_truth: GroundTruth,
    *,
    name: str = "detections",
    image_ids: str = "annotation",
    category_ids: str | Mapping[int, int] = "annotation",
    check: bool = True,
    objects: bool = True,
) -> Results:
    """Saved detections of many images, checked as ``iou-refiner validate`` does.

    Args:
        detections: path of COCO results; :class:`Results` or an object that has some as ``results``; a list of COCO
            records; or by image id what :func:`iou_refiner.connectors.to_numpy` takes, boxes in image pixels.
        ground_truth: the annotation they belong to.
        name: of the argument, for messages.
        image_ids, category_ids: of a file, see :func:`iou_refiner.connectors.ids.read_foreign_results`.
        check: refuse what ``validate`` calls an error.
        objects: check the annotated objects too, as where AP is measured.

    Raises:
        TypeError: it is nothing of that kind. DataError: a record is wrong; it is named.
    """
    foreign = image_ids != "annotation" or category_ids != "annotation"
    where: str | Path = f"`{name}`"
    if isinstance(detections, (str, PathLike)):
        where = Path(fspath(detections))
        results = read_foreign_results(where, ground_truth, image_ids=image_ids, category_ids=category_ids)
    elif foreign:
        raise ValueError(f"`image_ids` and `category_ids` are of a results file; `{name}` is none. Leave them out.")
    elif isinstance(getattr(detections, "results", detections), Results):
        results = getattr(detections, "results", detections)
    elif isinstance(detections, Mapping):
        results = results_of_images(detections)
    elif isinstance(detections, (list, tuple)):
        results = results_of_records(detections)
    else:
        raise TypeError(
            f"`{name}` must be a path of COCO results, a list of such records, a dict from image ids to boxes, or "
            f"Results, got {type(detections).__name__}."
        )
    if check:
        check_before(results, ground_truth, where, ann="the annotation" if objects else None)
    return results


def as_truth(annotations: Any) -> GroundTruth:
    """An annotation.

    Args:
        annotations: path of a COCO json, the dict that ``json.load`` makes of it, or :class:`GroundTruth`.

    Raises:
        TypeError: it is nothing of that kind. DataError: it breaks the format.
    """
    if isinstance(annotations, GroundTruth):
        return annotations
    if isinstance(annotations, (str, PathLike)):
        return read_ground_truth(fspath(annotations))
    if isinstance(annotations, Mapping):
        try:
            return to_ground_truth(msgspec.convert(annotations, GroundTruthFile), "`annotations`")
        except msgspec.ValidationError as error:
            raise DataError(f"`annotations` is no COCO annotation: {error}.") from None
    raise TypeError(
        "`annotations` must be a path of a COCO annotation, its dict, GroundTruth, or a Dataset of (image, target), "
        f"got {type(annotations).__name__}."
    )


@contextmanager
def data_of(annotations: Any, images: Any, folder: Path | None = None, **of_dataset: Any) -> Iterator[Any]:
    """An annotation and the folder of its images, or None where there are none.

    Args:
        annotations: as for :func:`as_truth`, or a torch Dataset of ``(image, target)``, which has its own images.
        images: path of their folder, or None.
        folder: where a Dataset is written to; None for a place that is gone afterwards.
        of_dataset: more for :func:`iou_refiner.verbs.datasets.write_dataset`.

    Raises:
        ValueError: a Dataset, and ``images`` too. TypeError, DataError: as :func:`as_truth`.
    """
    if isinstance(annotations, (GroundTruth, str, PathLike, Mapping)) or not hasattr(annotations, "__getitem__"):
        yield as_truth(annotations), None if images is None else Path(images)
        return
    if images is not None:
        raise ValueError("`annotations` is a Dataset, which has its images itself. Leave out `images`.")
    from iou_refiner.verbs.datasets import write_dataset

    if folder is not None:
        yield write_dataset(annotations, folder, **of_dataset), folder
        return
    with tempfile.TemporaryDirectory(prefix="iou-refiner-") as gone_afterwards:
        yield write_dataset(annotations, Path(gone_afterwards), **of_dataset), Path(gone_afterwards)


def check_images_exist(folder: Path, images: Iterable[Image]) -> None:
    """Raise DataError if images of an annotation are not in their folder, before anything runs for long."""
    from iou_refiner.detector.images import ImageFolder

    pictures, images = ImageFolder(folder), list(images)
    missing = [image for image in images if not pictures.path(image).exists()]
    if missing:
        first = missing[0]
        raise DataError(
            f"{len(missing):,} of {len(images):,} images are not in {folder} (first: image {first.id}, "
            f"{first.file_name!r}). Check --images, which the annotation's file names start from."
        )


def as_detector(detector: Any, device: torch.device) -> Adapter:
    """The adapter of a detector: a live module, an adapter, or what ``--detector`` says, as ``torchvision:NAME``."""
    from iou_refiner.detector.registry import as_adapter, detector_from_spec

    return (detector_from_spec(detector) if isinstance(detector, str) else as_adapter(detector)).to(device)


def as_device(device: Any, detector: Any = None) -> torch.device:
    """Where to compute: "auto" is where a live detector is already, else a GPU if there is one.

    Raises:
        ValueError: the device cannot be used here.
    """
    import torch

    if str(device) == "auto":
        weights = next(iter(detector.parameters()), None) if isinstance(detector, torch.nn.Module) else None
        return weights.device if weights is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"`device` {device} cannot be used here ({str(error).splitlines()[0]}).") from None
    return wanted


@contextmanager
def watched(progress: bool | Progress) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """What reports progress, and what is told notes: bars and stderr for True, nothing for False."""
    if progress is not True:
        yield (no_progress, no_note) if progress is False else (progress, no_note)
        return
    with progress_bars() as bars:
        yield bars, lambda text: print(text, file=sys.stderr)
