"""The demo: a detector and its IoU head, trained here and now, and what the head does for the boxes.

Everything is offline, on the CPU and seeded. Nothing is tuned on the images that the table is measured on.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from iou_refiner.checks import DataError
from iou_refiner.coco import GroundTruth, Image, Results, read_results, write_results
from iou_refiner.demo.data import WHAT_IT_IS, write_split
from iou_refiner.demo.network import read_detector, save_detector, train_detector
from iou_refiner.demo.picture import save_picture
from iou_refiner.detector.adapter import Adapter
from iou_refiner.detector.features import Extraction, extract_image
from iou_refiner.evaluation.agreement import Ranking, ranking, true_iou
from iou_refiner.evaluation.bootstrap import Comparison, compare
from iou_refiner.files import write_whole
from iou_refiner.head.iou_head import IoUPredictor
from iou_refiner.rescoring import Look, dump_candidates, rescore
from iou_refiner.stage.stage import Stage
from iou_refiner.training.recipe import train_head

#: Told of (phase, done, total).
Progress = Callable[[str, int, int], None]

_DETECTOR_ALONE: Mapping[str, Any] = {
    "nms": "greedy", "nms_threshold": 0.5, "moves": 0, "steps": 0, "score_alpha": 0.0,
}  # fmt: skip
#: What the stage is asked to do, and the settings that do just that.
STAGES: Mapping[str, Mapping[str, Any]] = {
    "IoU-guided NMS": {**_DETECTOR_ALONE, "nms": "iou", "rank_alpha": 0.75},
    "regression": {**_DETECTOR_ALONE, "moves": 1},
    "ascent": {**_DETECTOR_ALONE, "steps": 5},
    "the default": {},
}
# A smaller head than the default, fed few boxes of many images: it has half a minute, and a dozen backgrounds to learn
# by heart if it is let. Settings of the predictor, and of its training.
_HEAD: Mapping[str, Any] = {"width": 32, "hidden": (128, 128)}
_TRAINING: Mapping[str, Any] = {"batch_size": 4, "boxes_per_image": 48, "lr": 3e-3}
_SHOWN = ("AP", "AP50", "AP75", "AP90")
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


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured on images that neither detector nor head had seen.

    Args:
        comparisons: per name in :data:`STAGES`, the detector alone (before) and with it (after).
        class_score: how well the class score of a candidate follows its true IoU.
        predicted_iou: how well the predicted IoU does.
    """

    comparisons: Mapping[str, Comparison]
    class_score: Ranking
    predicted_iou: Ranking

    @property
    def about(self) -> str:
        """What the data is, and how well score and predicted IoU follow the true IoU."""
        images = self.comparisons["the default"].before.images
        return (
            f"Data: {WHAT_IT_IS}. {images:,} test images.\n"
            f"Correlation with the true IoU, over the {self.predicted_iou.count:,} candidates above IoU 0.5: "
            f"class score {self.class_score.pearson:.2f}, predicted IoU {self.predicted_iou.pearson:.2f}."
        )

    @property
    def head(self) -> tuple[str, ...]:
        """The names of the columns of :meth:`rows`."""
        return ("", "with", "before", "after", "difference", "95 % interval")

    def rows(self) -> list[tuple[str, ...]]:
        """One row per metric and stage, in points; the metric is named in the first of its rows."""
        found = {name: {row[0]: row[1:] for row in c.rows()} for name, c in self.comparisons.items()}
        return [
            (metric if index == 0 else "", name, *rows[metric])
            for metric in _SHOWN
            for index, (name, rows) in enumerate(found.items())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for json, fractions in [0, 1]."""
        return {
            "data": WHAT_IT_IS,
            "comparisons": {name: comparison.to_dict() for name, comparison in self.comparisons.items()},
            "class_score": self.class_score.to_dict(),
            "predicted_iou": self.predicted_iou.to_dict(),
        }


def run_demo(
    folder: str | Path, *, seed: int = 0, progress: Progress | None = None, budget: Budget | None = None
) -> DemoResult:
    """Draw images, train a detector and its IoU head, and measure what the head changes.

    Leaves in ``folder``: ``data/`` (images and COCO annotations), ``detector.safetensors``, ``head.safetensors``,
    ``candidates.json``, ``before.json`` and ``after.json`` (COCO results), ``before_after.png``, ``demo.json`` (the
    result) and ``README.txt`` (what to try on them).

    Args:
        folder: new, empty, or of an earlier demo, which is replaced.
        seed: of everything random.
        progress: called with (phase, done, total).
        budget: default: about two minutes on two cores.

    Returns:
        The result. On one machine, the same seed gives the same result to the last bit.

    Raises:
        DataError: the folder holds something else. MissingPackageError: a package of the extra ``demo`` is missing.
    """
    folder, budget = Path(folder), budget or Budget()
    say = progress or (lambda phase, done, total: None)
    _claim(folder)
    with _undisturbed():
        counts = {"train": budget.train_images, "head": budget.head_images, "test": budget.test_images}

        def draw(split: str) -> GroundTruth:
            return write_split(
                folder / "data", split, counts[split], seed=seed, progress=partial(say, f"drawing {split}")
            )

        truths = {"train": draw("train")}
        with ThreadPoolExecutor(1) as beside:  # what is needed later is drawn while the detector trains
            later = {split: beside.submit(draw, split) for split in ("head", "test")}
            detector = train_detector(
                folder / "data", truths["train"], steps=budget.detector_steps, seed=seed,
                progress=partial(say, "training the detector"),
            )  # fmt: skip
            truths |= {split: drawing.result() for split, drawing in later.items()}
        save_detector(detector, folder / _WEIGHTS)
        adapter = load_detector(folder)
        head = _train_head(folder, adapter, truths["head"], budget.head_epochs, seed, say)
        return _judge(folder, adapter, head, truths["test"], seed, say)


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
            f"iou-refiner rescore {folder}/candidates.json --head {folder}/head.safetensors {where} -o rescored.json",
            f"iou-refiner validate {folder}/candidates.json --ann {folder}/data/test.json",
        ]
    )


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


def _train_head(
    folder: Path, adapter: Adapter, truth: GroundTruth, epochs: int, seed: int, say: Progress
) -> IoUPredictor:
    """On images of their own: on those the detector was trained on, its candidates fit better than they will later."""
    with tempfile.TemporaryDirectory(prefix="training-", dir=folder) as work:
        train_head(
            adapter, (truth, folder / "data"), output_dir=Path(work), views=1, seed=seed, epochs=epochs,
            head=_HEAD, **_TRAINING, note=lambda text: None,
            progress=lambda phase, *count: say(f"{phase} the head", *count),
        )  # fmt: skip
        os.replace(Path(work) / "head.safetensors", folder / "head.safetensors")
    return IoUPredictor.load(folder / "head.safetensors")


def _judge(
    folder: Path, adapter: Adapter, head: IoUPredictor, truth: GroundTruth, seed: int, say: Progress
) -> DemoResult:
    """Measure on the files as they are written, so that the commands in README.txt say the same."""
    look = _remembering(partial(extract_image, adapter, folder / "data"))
    candidates = _stored(folder / "candidates.json", truth, dump_candidates(look, adapter.category_ids, truth))
    every = {**_DETECTOR_ALONE, "nms": "none", "max_detections": max(len(candidates), 1)}
    found = {}
    for number, (name, settings) in enumerate([("", _DETECTOR_ALONE), ("all", every), *STAGES.items()]):
        say("judging", number, len(STAGES) + 2)
        parts = rescore(look, adapter.category_ids, Stage(head, **settings), candidates, truth)
        found[name] = Results.concat(parts)
    before = _stored(folder / "before.json", truth, [found[""]])
    found["the default"] = _stored(folder / "after.json", truth, [found["the default"]])
    comparisons = {name: compare(before, found[name], truth, seed=seed) for name in STAGES}
    known = found["all"]
    fit = true_iou(known, truth)
    predicted = known.iou if known.iou is not None else fit[:0]
    result = DemoResult(comparisons, ranking(known.score, fit), ranking(predicted, fit))
    save_picture(folder / "before_after.png", folder / "data", truth, before, found["the default"], WHAT_IT_IS)
    _write(folder / "demo.json", json.dumps(result.to_dict(), indent=2) + "\n")
    say("judging", len(STAGES) + 2, len(STAGES) + 2)
    return result


def _stored(path: Path, truth: GroundTruth, parts: Any) -> Results:
    write_results(path, Results.concat(parts), image_order=[image.id for image in truth.images])
    return read_results(path)


def _remembering(look: Look) -> Look:
    """The same, asking the detector once per image."""
    seen: dict[int, Extraction] = {}

    def recall(image: Image) -> Extraction:
        if image.id not in seen:
            seen[image.id] = look(image)
        return seen[image.id]

    return recall
