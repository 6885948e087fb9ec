"""Is a detector that was trained together with its head better than one that was not? The table of docs/joint.md.

    python -m scripts.results.joint --weights WEIGHTS --work FOLDER [--data FOLDER] [--seeds 0 1 2] [--out ROWS.jsonl]

From the same weights of the small Faster R-CNN, and for the same number of steps of the same batch size:

    alone       the detector trained further by itself, then a head for it
    separate    the detector as it is, and a head for it
    joint       detector and head trained together; the head comes out of that
    joint then  the detector of ``joint``, then a new head for it: as many steps as ``alone`` in each of its two parts

Settings of the stage are chosen on val, figures are those of test. Every arm of a seed that is done has a row in
ROWS.jsonl and is not done again; a training that was stopped goes on. The rows ``joint - alone`` and so on compare two
arms image by image. Read them with ``--show``.

Time: with the defaults, on nuclei, about 35 minutes a seed on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table

from examples.small_detectors import SHARED, faster_rcnn, network
from iou_refiner import IoUHead, StageSettings, TrainSettings, load_head, save_head
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.coco import GroundTruth, Results, read_ground_truth, read_results, write_results
from iou_refiner.detector.cache import CachedFeatures, FeatureCache
from iou_refiner.evaluation.bootstrap import compare
from iou_refiner.files import to_json
from iou_refiner.rescoring import dump_candidates, rescore
from iou_refiner.stage.stage import Stage
from iou_refiner.training.recipe import choose_on
from iou_refiner.training.recipe import train as train_alone
from iou_refiner.training.samples import TrainingSet
from scripts.paths import ROOT
from scripts.results.pearson import pearson_of_images
from scripts.results.tables import change
from scripts.train_detector import train as train_detector
from scripts.train_detector import untrained_head
from scripts.training_images import TrainingImages

ARMS = ("alone", "separate", "joint", "joint then")
METRICS = ("AP", "AP50", "AP75", "AP90")
_PAIRS = (("joint", "alone"), ("joint then", "alone"), ("joint", "separate"), ("alone", "separate"))


@dataclass(frozen=True)
class Bed:
    """What all arms of a seed have in common."""

    weights: Path
    data: Path
    work: Path
    seed: int
    epochs: int
    size: int
    lr: float
    batch_size: int

    def truth(self, split: str) -> GroundTruth:
        return read_ground_truth(self.data / f"instances_{split}.json")

    def folder(self, arm: str) -> Path:
        return self.work / f"{arm.replace(' ', '-')}-{self.seed}"

    def detector(self, arm: str) -> TorchvisionAdapter:
        """The detector of an arm, which is trained if it is to be trained and was not yet."""
        if arm == "separate":
            return faster_rcnn(self.weights)
        arm = "joint" if arm == "joint then" else arm
        weights = self.folder(arm) / f"epoch-{self.epochs:02}.safetensors"
        if not weights.exists():
            self._train(self.folder(arm), joint=arm == "joint")
        return faster_rcnn(weights)

    def _train(self, folder: Path, *, joint: bool) -> None:
        truth, folder_of_images = self.truth("train"), self.data / "images"
        detector = network(max(category.id for category in truth.categories), self.size)
        detector.load_state_dict(safetensors.torch.load_file(self.weights))
        images = TrainingImages(TorchvisionAdapter(detector, longest_side=self.size), folder_of_images, truth)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.seed)
        for metrics in train_detector(
            images.adapter, images, (self.truth("val"), folder_of_images), output=folder, epochs=self.epochs,
            lr=self.lr, batch_size=self.batch_size, seed=self.seed, resume=True,
            head=untrained_head(images) if joint else None,
        ):  # fmt: skip
            say(f"{folder.name}: {to_json(metrics)}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def head_of(bed: Bed, arm: str, adapter: TorchvisionAdapter) -> IoUHead:
    """The head of an arm, its settings chosen on val."""
    folder = bed.folder(arm) / "trained-head"
    if not (folder / "chosen").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if arm == "joint":
            head: Any = load_head(bed.folder(arm) / f"head-{bed.epochs:02}.safetensors")
            source = cached(bed, arm, adapter, "val")
            choose_on(head, source.load, bed.truth("val"), adapter, seed=bed.seed).keep_in(head)
            save_head(head, folder / "head.safetensors")
        else:
            settings = TrainSettings(views=bed.epochs, epochs=1, batch_size=bed.batch_size)
            train_alone(
                adapter, (bed.truth("train"), bed.data / "images"), (bed.truth("val"), bed.data / "images"),
                output_dir=folder, settings=settings, siblings=None, cache=bed.folder(arm) / "cache", seed=bed.seed,
                resume=True, note=say,
            )  # fmt: skip
        (folder / "chosen").touch()
    head = load_head(folder / "head.safetensors")
    assert isinstance(head, IoUHead)
    return head


def cached(bed: Bed, arm: str, adapter: TorchvisionAdapter, split: str) -> CachedFeatures:
    """The features of a split, extracted once."""
    source = FeatureCache(bed.folder(arm) / "cache", adapter).of(bed.data / "images")
    for _ in source.fill(bed.truth(split).images, view=0):
        pass
    return source


def measured(bed: Bed, arm: str) -> dict[str, Any]:
    """The row of an arm: what its detector does by itself and with the stage, on test."""
    began = time.process_time()
    adapter = bed.detector(arm)
    head, truth, source = head_of(bed, arm, adapter), bed.truth("test"), cached(bed, arm, adapter, "test")
    candidates = Results.concat(dump_candidates(source.load, adapter.category_ids, truth))
    own = StageSettings.detector_only(nms_threshold=adapter.nms_threshold)
    results = {}
    for name, settings in {"own": own, "stage": None}.items():
        stage = Stage(head, settings, own_threshold=adapter.nms_threshold)
        results[name] = Results.concat(rescore(source.load, adapter.category_ids, stage, candidates, truth))
        write_results(bed.folder(arm) / f"test-{name}.json", results[name])
    row = compare(results["own"], results["stage"], truth).to_dict()
    row["recommended"] = dict(head.metadata.recommended)
    row["pearson"] = pearson_of_images(head, TrainingSet(source, truth))
    row["cpu_seconds"] = time.process_time() - began
    shutil.rmtree(bed.folder(arm) / "cache")
    return row


def rows_of(bed: Bed, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The rows of a seed that are not done yet."""
    about = {"data": bed.data.name, "seed": bed.seed, "epochs": bed.epochs}
    for arm in ARMS:
        if (*about.values(), arm) not in done:
            yield {**about, "arm": arm, **measured(bed, arm)}
    for one, other in _PAIRS:
        for name in ("own", "stage"):
            pair = f"{one} - {other}, {name}"
            if (*about.values(), pair) not in done and (one, name) != ("joint then", "own"):
                before, after = (read_results(bed.folder(arm) / f"test-{name}.json") for arm in (other, one))
                yield {**about, "arm": pair, **compare(before, after, bed.truth("test")).to_dict()}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "data", "seed", "epochs", "arm", *METRICS, *(f"{name}: difference [95 %]" for name in METRICS), "Pearson"
    )
    for row in rows:
        pearson = row.get("pearson")
        table.add_row(
            row["data"], str(row["seed"]), str(row["epochs"]), row["arm"],
            *(f"{100 * row['after']['metrics'][name]:.1f}" for name in METRICS),
            *(change(row, name) for name in METRICS),
            "{value:.3f} [{low:.3f}, {high:.3f}]".format(**pearson) if pearson else "",
        )  # fmt: skip
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="of scripts/train_detector.py, which every arm starts from")
    parser.add_argument("--work", type=Path, default=Path("runs/joint"), help="folder for weights, heads and results")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "nuclei", help="folder of images, annotations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training images, in every part")
    parser.add_argument("--size", type=int, default=512, help="longest side of the images in pixels")
    parser.add_argument("--lr", type=float, default=2e-4, help="highest learning rate of the detector")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "joint.jsonl")
    parser.add_argument("--show", action="store_true", help="only print the rows that are there")
    options = parser.parse_args()
    if not options.show:
        if options.weights is None:
            parser.error("--weights is missing: the weights that every arm starts from.")
        torch.set_num_threads(1)
        for seed in options.seeds:
            bed = Bed(
                options.weights, options.data, options.work, seed, options.epochs, options.size, options.lr,
                options.batch_size,
            )  # fmt: skip
            done = {tuple(row[key] for key in ("data", "seed", "epochs", "arm")) for row in read_rows(options.out)}
            for row in rows_of(bed, done):
                with options.out.open("a") as stream:
                    stream.write(to_json(row) + "\n")
                say(f"{bed.data.name} seed {seed}: {row['arm']} done")
    show(read_rows(options.out))


if __name__ == "__main__":
    main()
