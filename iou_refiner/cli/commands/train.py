"""``iou-refiner train``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from iou_refiner.cli.console import Console, UsageError
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.inputs import check_apart, check_images, check_writable, detector_files, detector_on
from iou_refiner.cli.options import Annotation, Detector, Images, NoCheck, Overwrite, Quiet
from iou_refiner.cli.without_detector import train_without_detector
from iou_refiner.detector.loading import Loading
from iou_refiner.head.config import HeadConfig
from iou_refiner.progress import Progress
from iou_refiner.training.settings import TrainSettings

if TYPE_CHECKING:
    from iou_refiner.coco import GroundTruth
    from iou_refiner.detector.adapter import Adapter

_CACHE = (
    "Keep and reuse features in this folder (float16); none: run the detector in every epoch; auto: what is quicker. "
    "The head is the same."
)
_DETECTIONS = "Candidates before suppression, COCO results (see `dump`): train on these alone, without a detector."
_VAL_ANN = "COCO annotation to measure on after each epoch, and to choose what to do with the head."
_SIBLINGS = "Also train a network over siblings, the overlapping candidates of a box; default. --no-siblings: without."
_NEEDED = (
    "--detector and --images are needed for a head that reads features; without both: --detections, a results file "
    "from before suppression (see: iou-refiner dump)."
)
_CHECKPOINT = "How often the state to resume from is kept within an epoch; it is at the end of each."


def train(
    *,
    detector: Detector | None = None,
    ann: Annotation,
    images: Images | None = None,
    detections: Annotated[Path | None, Parameter(help=_DETECTIONS)] = None,
    output_dir: Annotated[Path, Parameter(name=["--output-dir", "-o"], help="Folder for head, metrics and config.")],
    val_ann: Annotated[Path | None, Parameter(help=_VAL_ANN)] = None,
    val_images: Annotated[Path | None, Parameter(help="Folder of its images; default: --images.")] = None,
    val_detections: Annotated[Path | None, Parameter(help="Candidates of its images, with --detections.")] = None,
    cache: Annotated[str, Parameter(help=_CACHE)] = "auto",
    checkpoint_minutes: Annotated[float, Parameter(validator=Number(gt=0), help=_CHECKPOINT)] = 10.0,
    class_aware: Annotated[bool, Parameter(negative=(), help="One IoU per class instead of one for all.")] = False,
    siblings: Annotated[bool, Parameter(negative="--no-siblings", show_default=False, help=_SIBLINGS)] = True,
    config: Annotated[HeadConfig, Parameter(name="*", group="Head")] = HeadConfig(),  # noqa: B008 - frozen
    settings: Annotated[TrainSettings, Parameter(name="*", group="Training")] = TrainSettings(),  # noqa: B008 - frozen
    loading: Annotated[Loading, Parameter(name="*", group="Loading")] = Loading(),  # noqa: B008 - frozen
    check: NoCheck = True,
    resume: Annotated[bool, Parameter(negative=(), help="Go on where a stopped run in the same folder ended.")] = False,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Train a head: on a frozen detector's features, or, with --detections, on saved candidates alone.

    With --detector and --images, the head reads features; the detector's weights never change, which is checked. With
    --detections, no detector and no images are needed, and the training takes minutes.

    On many GPUs or machines: torchrun --nproc-per-node 8 -m iou_refiner train ... (docs/scaling.md).
    """
    inputs = [ann, val_ann, detections, val_detections, *detector_files(detector or "")]
    head = _check_files(output_dir, overwrite or resume, inputs)
    if detections is not None:
        _check_alone(detector, images, settings, config, (val_detections, val_ann))
        val_files = (val_detections, val_ann) if val_detections and val_ann else None
        return train_without_detector(head, (detections, ann), val_files, check=check, console=console)
    if detector is None or images is None:
        raise UsageError(_NEEDED)
    parts = {"training": (ann, images), "validation": (val_ann, val_images or images)}

    def training(adapter: Adapter, data: list[tuple[GroundTruth, Path]], progress: Progress) -> dict[str, float]:
        from iou_refiner.siblings.config import SiblingConfig
        from iou_refiner.training.recipe import train as train_on

        return train_on(
            adapter, *data, output_dir=output_dir, config=config, settings=settings, class_aware=class_aware,
            siblings=SiblingConfig() if siblings else None, cache=cache, loading=loading, seed=console.seed,
            resume=resume, checkpoint_minutes=checkpoint_minutes, device=console.torch_device(), note=console.note,
            progress=progress,
        )[-1]  # fmt: skip

    return _train_in_this_process(head, detector, parts, training, console)


def _train_in_this_process(
    head: Path,
    detector: str,
    parts: dict[str, tuple[Path | None, Path]],
    training: Callable[[Adapter, list[tuple[GroundTruth, Path]], Progress], dict[str, float]],
    console: Console,
) -> int:
    """One of the processes of a training, or the only one."""
    from iou_refiner.parallel.ranks import device_of_this_process, joined

    with console.usage():
        console.device = device_of_this_process(console.device)
    with joined() as ranks:
        console.quiet = console.quiet or not ranks.first  # what all processes would say, the first one says
        adapter, data = _read(detector, parts, console)
        head.parent.mkdir(parents=True, exist_ok=True)
        if ranks.first:
            console.save_config(head)
        console.after_interrupt = (
            f"Features that were cached are kept, and in {head.parent} the last checkpoint: --resume goes on there."
        )
        with console.progress() as progress:
            last = training(adapter, data, progress)
    if ranks.first:
        text = f"{head}: " + ", ".join(f"{k} {v:.4g}" for k, v in last.items())
        console.data(last | {"output": str(head.parent)}, text)
    return OK


def _check_alone(
    detector: str | None,
    images: Path | None,
    settings: TrainSettings,
    config: HeadConfig,
    validation: tuple[Path | None, Path | None],
) -> None:
    """Refuse what a training on saved candidates has no use for, or lacks."""
    if detector is not None or images is not None:
        raise UsageError("--detections needs neither --detector nor --images. Leave out these, or that.")
    if settings != TrainSettings() or config != HeadConfig():
        raise UsageError(
            "--detections takes none of the options under Head and Training: they are of a head that reads features."
        )
    if (validation[0] is None) != (validation[1] is None):
        raise UsageError("--val-ann and --val-detections belong together: give both, or none.")


def _read(
    detector: str, parts: dict[str, tuple[Path | None, Path]], console: Console
) -> tuple[Adapter, list[tuple[GroundTruth, Path]]]:
    """The detector, and the annotations that there are with their folders, once it is sure that they can teach."""
    from iou_refiner.coco import read_ground_truth
    from iou_refiner.training.before import check_objects, trained_categories

    data = {what: (read_ground_truth(path), folder) for what, (path, folder) in parts.items() if path is not None}
    for what, (ground_truth, folder) in data.items():
        check_objects(ground_truth, what)
        check_images(folder, ground_truth.images)
    adapter = detector_on(detector, console)
    for what, (ground_truth, _) in data.items():
        trained_categories(adapter.category_ids, ground_truth, what)
    return adapter, list(data.values())


def _check_files(output_dir: Path, replace: bool, inputs: list[Path | None]) -> Path:
    """Where the head goes, once it is sure that nothing is lost by training into this folder."""
    head = output_dir / "head.safetensors"
    check_writable(output_dir)
    outputs = ("head.safetensors", "head.safetensors.config.json", "last.pt", "metrics.jsonl")
    check_apart([output_dir / name for name in outputs], [path for path in inputs if path is not None])
    if head.exists() and not replace:
        raise UsageError(f"{output_dir} holds a head already. Add --resume or --overwrite, or name another folder.")
    return head
