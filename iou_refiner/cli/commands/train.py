"""``iou-refiner train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from iou_refiner.cli.console import UsageError
from iou_refiner.cli.exit_codes import OK
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
    from iou_refiner.coco import read_ground_truth
    from iou_refiner.detector.registry import detector_from_spec
    from iou_refiner.training.recipe import train as train_on

    head = output_dir / "head.safetensors"
    if head.exists() and not (overwrite or resume):
        raise UsageError(f"{output_dir} holds a head already. Add --resume or --overwrite, or name another folder.")
    adapter = detector_from_spec(detector).to(console.torch_device())
    output_dir.mkdir(parents=True, exist_ok=True)
    console.save_config(head)
    data = [(read_ground_truth(ann), images)]
    if val_ann is not None:
        data.append((read_ground_truth(val_ann), val_images or images))
    with console.progress() as progress:
        history = train_on(
            adapter, *data, output_dir=output_dir, config=config, settings=settings, class_aware=class_aware,
            cache=cache, seed=console.seed, resume=resume, device=console.torch_device(),
            note=console.note, progress=progress,
        )  # fmt: skip
    last = history[-1]
    console.data(last | {"output": str(output_dir)}, f"{head}: " + ", ".join(f"{k} {v:.4g}" for k, v in last.items()))
    return OK
