"""The demo: a detector and its IoU head, trained here and now, and what the head does for the boxes.

Everything is offline, on the CPU and seeded. Nothing is tuned on the images that the table is measured on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Image, Results, read_results, write_results
from iou_refiner.demo.data import WHAT_IT_IS, write_split
from iou_refiner.demo.network import read_detector, save_detector, train_detector
from iou_refiner.demo.picture import save_picture
from iou_refiner.demo.result import DemoResult
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.features import Extraction
from iou_refiner.detector.sources import FeatureSource, feature_source
from iou_refiner.evaluation.agreement import agreement
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.evaluation.true_iou import true_iou
from iou_refiner.files import write_whole
from iou_refiner.head.checkpoint import Head, load_head
from iou_refiner.head.config import HeadConfig
from iou_refiner.progress import Progress, no_progress
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage.settings import StageSettings
from iou_refiner.stage.stage import Stage
from iou_refiner.training.recipe import train
from iou_refiner.training.settings import TrainSettings

_DETECTOR_ONLY = StageSettings.detector_only()
#: What the stage does in each comparison, and nothing else; None is what the head recommends, here the defaults.
STAGES: Mapping[str, StageSettings | None] = {
    "IoU-guided NMS": _DETECTOR_ONLY.replace(nms="iou_guided", rank_alpha=0.75),
    "regression": _DETECTOR_ONLY.replace(regression_steps=1, final_nms="greedy"),
    "ascent": _DETECTOR_ONLY.replace(ascent_steps=5, final_nms="greedy"),
    "the default": None,
}
# A smaller head than the default, trained on few boxes of many images: it has half a minute, and only a dozen
# backgrounds, which it would soon overfit to.
_HEAD = HeadConfig(width=32, hidden=(128, 128))
_TRAINING = TrainSettings(views=1, batch_size=4, boxes_per_image=48, lr=3e-3)
_WEIGHTS = "detector.safetensors"
# A fixed number, since the order of sums, and with it the last bit of every weight, depends on it. One, since so small
# a network gains little from a second thread, and loses much when that thread has to wait for its core.
_THREADS = 1


@dataclass(frozen=True)
class Budget:
    """How much is drawn and trained. Counts, not seconds: the same numbers come out of any machine."""

    train_images: int = 480
    head_images: int = 450
    test_images: int = 120
    detector_steps: int = 480
    head_epochs: int = 3


def run_demo(
    folder: str | Path, *, seed: int = 0, progress: Progress = no_progress, budget: Budget | None = None
) -> DemoResult:
    """Draw images, train a detector and its IoU head, and measure what the head changes.

    Leaves in ``folder``: ``data/`` (images and COCO annotations), ``detector.safetensors``, ``head.safetensors``,
    ``candidates.json``, ``before.json`` and ``after.json`` (COCO results), ``before_after.png``, ``demo.json`` (the
    result) and ``README.txt`` (what to try on them).

    Args:
        folder: new, empty, or of an earlier demo, which is replaced.
        seed: of everything random.
        progress: see :class:`Progress`.
        budget: default: about two minutes on two cores.

    Returns:
        The result. On one machine, the same seed gives the same result to the last bit.

    Raises:
        DataError: the folder holds something else. MissingPackageError: a package of the extra ``demo`` is missing.
    """
    folder, budget = Path(folder), budget or Budget()
    _claim(folder)
    with _undisturbed():
        counts = {"train": budget.train_images, "head": budget.head_images, "test": budget.test_images}

        def draw(split: str) -> GroundTruth:
            return write_split(folder / "data", split, counts[split], seed=seed, progress=progress)

        truths = {"train": draw("train")}
        with ThreadPoolExecutor(1) as beside:  # what is needed later is drawn while the detector trains
            later = {split: beside.submit(draw, split) for split in ("head", "test")}
            detector = train_detector(
                folder / "data", truths["train"], steps=budget.detector_steps, seed=seed, progress=progress
            )
            truths |= {split: drawing.result() for split, drawing in later.items()}
        save_detector(detector, folder / _WEIGHTS)
        adapter = load_detector(folder)
        head = _train_head(folder, adapter, truths["head"], budget.head_epochs, seed, progress)
        return _measure(folder, adapter, head, truths["test"], seed, progress)


def load_detector(folder: str | Path) -> Adapter:
    """The detector that a demo trained in ``folder``, ready for every other command.

    Raises:
        DataError: no demo was run there.
    """
    from iou_refiner.adapters.torchvision import TorchvisionAdapter

    adapter: Adapter = TorchvisionAdapter(read_detector(Path(folder) / _WEIGHTS))
    return adapter


def detector() -> Adapter:
    """For ``--detector iou_refiner.demo:detector``: of the folder that ``IOU_REFINER_DEMO`` names, default ``demo``."""
    return load_detector(os.environ.get("IOU_REFINER_DEMO", "demo"))


def follow_up(folder: str | Path) -> str:
    """The commands to try on what the demo left in ``folder``, one a line."""
    where = f"--detector iou_refiner.demo:detector --ann {folder}/data/test.json --images {folder}/data"
    return "\n".join(
        [
            f"export IOU_REFINER_DEMO={folder}",
            f"iou-refiner eval {folder}/after.json --baseline {folder}/before.json --ann {folder}/data/test.json",
            report_command(folder),
            f"iou-refiner rescore {folder}/candidates.json --head {folder}/head.safetensors {where} -o rescored.json",
            f"iou-refiner validate {folder}/candidates.json --ann {folder}/data/test.json",
        ]
    )


def report_command(folder: str | Path) -> str:
    """The command that makes a page of what the demo left in ``folder``."""
    files = f"{folder}/before.json {folder}/after.json --ann {folder}/data/test.json --images {folder}/data"
    return f"iou-refiner report {files} -o {folder}/report.html"


def _claim(folder: Path) -> None:
    """Make the folder and mark it as the demo's, unless it holds what is not the demo's to replace."""
    note = folder / "README.txt"
    title = "Made by: iou-refiner demo\n"
    ours = note.exists() and note.read_text(errors="replace").startswith(title)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not ours:
        raise DataError(f"{folder} exists and holds no demo: nothing in it is replaced. Name a new folder with -o.")
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        note, f"{title}Data: {WHAT_IT_IS}.\n\nTry, from the folder the demo was started in:\n\n{follow_up(folder)}\n"
    )


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A fixed number of threads in here, and afterwards torch's threads and generator as they were before."""
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _train_head(folder: Path, adapter: Adapter, truth: GroundTruth, epochs: int, seed: int, progress: Progress) -> Head:
    """On images of their own: on those the detector was trained on, its candidates fit better than they will later."""
    with tempfile.TemporaryDirectory(prefix="training-", dir=folder) as work:
        train(
            adapter, (truth, folder / "data"), output_dir=Path(work), config=_HEAD,
            settings=replace(_TRAINING, epochs=epochs), siblings=None, seed=seed, note=lambda text: None,
            progress=lambda phase, done, total: progress(f"{phase} the head", done, total),
        )  # fmt: skip
        os.replace(Path(work) / "head.safetensors", folder / "head.safetensors")
    return load_head(folder / "head.safetensors")


def _measure(
    folder: Path, adapter: Adapter, head: Head, truth: GroundTruth, seed: int, progress: Progress
) -> DemoResult:
    """Measure on the files as they are written, so that the commands in README.txt say the same."""
    source = _memoized(feature_source(adapter, folder / "data"))
    candidates = _stored(folder / "candidates.json", truth, dump_candidates(source, adapter.category_ids, truth))
    unsuppressed = _DETECTOR_ONLY.replace(nms="none", max_detections=max(len(candidates), 1))
    runs = {"detector": _DETECTOR_ONLY, "candidates": unsuppressed, **STAGES}
    results = {}
    for number, (name, settings) in enumerate(runs.items()):
        progress("measuring", number, len(runs))
        parts = rescore(source, adapter.category_ids, Stage(head, settings), candidates, truth)
        results[name] = Results.concat(parts)
    before = _stored(folder / "before.json", truth, [results["detector"]])
    after = results["the default"] = _stored(folder / "after.json", truth, [results["the default"]])
    comparisons = {name: compare(before, results[name], truth, seed=seed) for name in STAGES}
    everything = results["candidates"]
    truth_iou = true_iou(everything, truth)
    predicted = everything.iou if everything.iou is not None else truth_iou[:0]
    result = DemoResult(comparisons, agreement(everything.score, truth_iou), agreement(predicted, truth_iou))
    save_picture(folder / "before_after.png", folder / "data", truth, before, after, WHAT_IT_IS)
    _write(folder / "demo.json", json.dumps(result.to_dict(), indent=2) + "\n")
    progress("measuring", len(runs), len(runs))
    return result


def _stored(path: Path, truth: GroundTruth, parts: Any) -> Results:
    write_results(path, Results.concat(parts), image_order=[image.id for image in truth.images])
    return read_results(path)


def _memoized(source: FeatureSource) -> FeatureSource:
    """The same, running the detector once per image."""
    extractions: dict[int, Extraction] = {}

    def remembered(image: Image) -> Extraction:
        if image.id not in extractions:
            extractions[image.id] = source(image)
        return extractions[image.id]

    return remembered
