"""``iou-refiner train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from iou_refiner.cli.console import UsageError
from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.inputs import check_apart, check_images, check_writable, detector_files, detector_on
from iou_refiner.cli.options import Annotation, Cache, Detector, Images, Overwrite, Quiet
from iou_refiner.head.config import HeadConfig
from iou_refiner.training.settings import TrainSettings


def train(
    *,
    detector: Detector,
    ann: Annotation,
    images: Images,
    output_dir: Annotated[Path, Parameter(name=["--output-dir", "-o"], help="Folder for head, metrics and config.")],
    val_ann: Annotated[Path | None, Parameter(help="COCO annotation to measure on after each epoch.")] = None,
    val_images: Annotated[Path | None, Parameter(help="Folder of its images; default: --images.")] = None,
    cache: Cache = None,
    class_aware: Annotated[bool, Parameter(negative=(), help="One IoU per class instead of one for all.")] = False,
    config: Annotated[HeadConfig, Parameter(name="*", group="Head")] = HeadConfig(),  # noqa: B008 - frozen
    settings: Annotated[TrainSettings, Parameter(name="*", group="Training")] = TrainSettings(),  # noqa: B008 - frozen
    resume: Annotated[bool, Parameter(negative=(), help="Go on where a stopped run in the same folder ended.")] = False,
    overwrite: Overwrite = False,
    console: Quiet,
) -> int:
    """Train an IoU head on a frozen detector's features. The detector's weights never change, which is checked."""
    head = _check_files(output_dir, overwrite or resume, [ann, val_ann, *detector_files(detector)])
    from iou_refiner.coco import read_ground_truth
    from iou_refiner.training.before import check_objects, trained_categories
    from iou_refiner.training.recipe import train as train_on

    parts = {"training": (ann, images), "validation": (val_ann, val_images or images)}
    data = {what: (read_ground_truth(path), folder) for what, (path, folder) in parts.items() if path is not None}
    for what, (ground_truth, folder) in data.items():
        check_objects(ground_truth, what)
        check_images(folder, ground_truth.images)
    adapter = detector_on(detector, console)
    for what, (ground_truth, _) in data.items():
        trained_categories(adapter.category_ids, ground_truth, what)
    output_dir.mkdir(parents=True, exist_ok=True)
    console.save_config(head)
    console.after_interrupt = (
        f"Features already extracted are kept in {cache or output_dir / 'cache'}, and epochs that were finished in "
        f"{output_dir}: --resume goes on there."
    )
    with console.progress() as progress:
        history = train_on(
            adapter, *data.values(), output_dir=output_dir, config=config, settings=settings, class_aware=class_aware,
            cache=cache, seed=console.seed, resume=resume, device=console.torch_device(),
            note=console.note, progress=progress,
        )  # fmt: skip
    last = history[-1]
    console.data(last | {"output": str(output_dir)}, f"{head}: " + ", ".join(f"{k} {v:.4g}" for k, v in last.items()))
    return OK


def _check_files(output_dir: Path, replace: bool, inputs: list[Path | None]) -> Path:
    """Where the head goes, once it is sure that nothing is lost by training into this folder."""
    head = output_dir / "head.safetensors"
    check_writable(output_dir)
    outputs = ("head.safetensors", "head.safetensors.config.json", "last.pt", "metrics.jsonl")
    check_apart([output_dir / name for name in outputs], [path for path in inputs if path is not None])
    if head.exists() and not replace:
        raise UsageError(f"{output_dir} holds a head already. Add --resume or --overwrite, or name another folder.")
    return head
