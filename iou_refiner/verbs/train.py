"""``iou_refiner.train``: what ``iou-refiner train`` does, from Python."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iou_refiner.detector.loading import Loading
from iou_refiner.evaluation.ap import plain
from iou_refiner.evaluation.tables import Table
from iou_refiner.head.config import HeadConfig
from iou_refiner.progress import Progress
from iou_refiner.training.settings import TrainSettings
from iou_refiner.verbs.inputs import as_detector, as_device, as_results, as_truth, check_images_exist, data_of, watched

if TYPE_CHECKING:
    from iou_refiner.head.checkpoint import Head


@dataclass(frozen=True, repr=False)
class Trained(Table):
    """A trained head.

    Args:
        head: path of its file.
        history: metrics of each epoch; the last one also has what the choice of settings measured on validation.
    """

    head: Path
    history: tuple[Mapping[str, float], ...]

    @property
    def caption(self) -> str:
        """Where the head is."""
        return str(self.head)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return ("", "last epoch")

    def rows(self) -> list[tuple[str, str]]:
        """A row ("loss", "0.1234") per metric of the last epoch."""
        return [(name, f"{value:.4g}") for name, value in self.history[-1].items()]

    def load(self) -> Head:
        """The head itself, as :func:`iou_refiner.load_head` reads it."""
        from iou_refiner.head.checkpoint import load_head

        return load_head(self.head)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json; None for what is no number."""
        return {"head": str(self.head), "history": [plain(epoch) for epoch in self.history]}


def train(
    detector: Any = None,
    *,
    annotations: Any,
    images: str | PathLike[str] | None = None,
    detections: Any = None,
    output_dir: str | PathLike[str],
    val_annotations: Any = None,
    val_images: str | PathLike[str] | None = None,
    val_detections: Any = None,
    config: HeadConfig | None = None,
    settings: TrainSettings | None = None,
    class_aware: bool = False,
    siblings: bool = True,
    cache: str | PathLike[str] = "auto",
    loading: Loading | None = None,
    device: Any = "auto",
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    check: bool = True,
    progress: bool | Progress = True,
) -> Trained:
    """Train a head: on the features of a frozen detector, or, with ``detections``, on saved candidates alone.

    Args:
        detector: a live detector of a framework with an adapter, an :class:`Adapter`, or what ``--detector`` says, as
            "torchvision:fasterrcnn_resnet50_fpn_v2". Its weights never change. Leave it out with ``detections``.
        annotations: path of a COCO annotation, its dict, GroundTruth, or a torch Dataset of ``(image, target)``, which
            is written to ``output_dir`` as PNG first (:mod:`iou_refiner.verbs.datasets`).
        images: folder of the images of a COCO annotation.
        detections: candidates before suppression, in any form that :func:`iou_refiner.evaluate` takes. No detector and
            no images are needed then, and the training takes minutes.
        output_dir: folder for ``head.safetensors``; made if missing.
        val_annotations, val_images, val_detections: the same of other images, to choose on what to do with the head.
            ``val_images`` is ``images`` unless given.
        config, settings: architecture of the head that reads features, and its training.
        class_aware: one IoU per class instead of one for all.
        siblings: also train a network over the overlapping candidates of a box.
        cache: folder to keep features in; "none": run the detector in every epoch; "auto": what is quicker.
        loading: how images reach the detector.
        device: "auto", or one of torch's. "auto" leaves a live detector where it is.
        seed: of everything random.
        resume: go on where a stopped training in the same folder ended.
        overwrite: replace a head that is there.
        check: refuse candidates that ``iou-refiner validate`` calls wrong, or that were suppressed already.
        progress: bars and notes for True, nothing for False, or what is called as work goes on.

    Returns:
        The head's file and its metrics: ``trained.head``, ``trained.load()``. It prints as a table.

    Raises:
        DataError: the data cannot teach, or breaks its format. FileExistsError: there is a head already.
        ValueError, TypeError: arguments that do not go together, or are nothing of that kind.
    """
    folder = Path(fspath(output_dir))
    head = folder / "head.safetensors"
    if head.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{folder} holds a head already. Add resume=True or overwrite=True, or name another folder."
        )
    if detections is None and (detector is None or val_detections is not None):
        raise ValueError(
            "Give a `detector`, for a head that reads its features, or `detections`, for one that needs none."
        )
    if detections is not None:
        _check_alone(detector, images, config, settings, validation=(val_detections, val_annotations))
        parts = [(detections, annotations), *([] if val_detections is None else [(val_detections, val_annotations)])]
        return _from_candidates(head, parts, seed=seed, check=check, progress=progress)
    options = {"config": config, "settings": settings, "class_aware": class_aware, "cache": cache, "loading": loading}
    return _from_features(
        head, detector, [("train", annotations, images), ("val", val_annotations, val_images or images)], device,
        progress, seed=seed, resume=resume, siblings=siblings, **options,
    )  # fmt: skip


def _check_alone(*needless: Any, validation: tuple[Any, Any]) -> None:
    """Refuse what a training on saved candidates has no use for, or lacks."""
    if any(value is not None for value in needless):
        raise ValueError(
            "`detections` needs none of `detector`, `images`, `config`, `settings`. Leave out these, or that."
        )
    if (validation[0] is None) != (validation[1] is None):
        raise ValueError("`val_annotations` and `val_detections` belong together: give both, or none.")


def _from_candidates(
    head: Path, parts: list[tuple[Any, Any]], *, seed: int, check: bool, progress: bool | Progress
) -> Trained:
    from iou_refiner.training.from_candidates import train_from_candidates

    data = []
    for results, annotation in parts:
        truth = as_truth(annotation)
        data.append((as_results(results, truth, check=check), truth))
    first = parts[0][0]
    with watched(progress) as (bars, note):
        history = train_from_candidates(
            data[0], data[1] if data[1:] else None, output_dir=head.parent, seed=seed, check=check, note=note,
            progress=bars, detector_name=Path(first).name if isinstance(first, (str, PathLike)) else "",
        )  # fmt: skip
    return Trained(head, tuple(history))


def _from_features(
    head: Path,
    detector: Any,
    parts: list[tuple[str, Any, Any]],
    device: Any,
    progress: bool | Progress,
    *,
    siblings: bool,
    **options: Any,
) -> Trained:
    """In each of the processes that torchrun started, or the only one."""
    from iou_refiner.parallel.ranks import device_of_this_process, joined
    from iou_refiner.siblings.config import SiblingConfig
    from iou_refiner.training.before import check_objects
    from iou_refiner.training.recipe import train as train_on

    with joined() as ranks, watched(progress if ranks.first else False) as (bars, note), ExitStack() as stack:
        where = as_device(device_of_this_process(str(device)), detector)
        adapter = as_detector(detector, where)
        data = []
        for name, annotation, images in parts:
            if annotation is None:
                continue
            about = {"category_ids": adapter.category_ids, "progress": bars}
            place = head.parent / "dataset" / name
            truth, folder = stack.enter_context(data_of(annotation, images, place, **about))
            if folder is None:
                raise ValueError(f"`images` is needed: the folder of the images of the {name} annotation.")
            check_objects(truth, "training" if name == "train" else "validation")
            check_images_exist(folder, truth.images)
            data.append((truth, folder))
        history = train_on(
            adapter, *data, output_dir=head.parent, device=where, note=note, progress=bars,
            siblings=SiblingConfig() if siblings else None, **options,
        )  # fmt: skip
    return Trained(head, tuple(history))
