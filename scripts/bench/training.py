"""How fast training goes, and what memory it takes.

    python -m scripts.bench.training rates       one process and two, with and without threads, cached and live
    python -m scripts.bench.training coco        a data set of COCO's size without a cache: start, rate, memory

``rates`` trains on photographs with examples/small_detectors.py, ``coco`` on 118,287 links to one picture with a
detector that costs nothing. Each prints a table. Needs Linux: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage

from examples.small_detectors import SHARED
from iou_refiner import Adapter, Detections, FeatureMaps, ImageTransform
from iou_refiner.detector.adapter import Suppression
from scripts.paths import ROOT

_PHOTOGRAPHS = SHARED / "data" / "coco-person"
_COCO_IMAGES, _COCO_BOXES = 118_287, 860_000
_LITE0 = f"{ROOT / 'examples' / 'small_detectors.py'}:faster_rcnn"


class Stub(torch.nn.Module, Adapter):
    """A detector that costs nothing: constant features, fifty constant candidates of label 1."""

    training = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        generator = torch.Generator().manual_seed(0)
        self.maps = tuple(torch.rand(1, 16, 64 // stride, 64 // stride, generator=generator) for stride in (4, 8, 16))
        corner = 40 * torch.rand(50, 2, generator=generator)
        self.boxes = torch.cat([corner, corner + 4 + 20 * torch.rand(50, 2, generator=generator)], 1)

    @property
    def detector(self) -> Stub:
        return self

    def settings(self) -> str:
        return "none"

    def prepare(self, rgb: np.ndarray) -> tuple[torch.Tensor, ImageTransform]:
        return torch.from_numpy(np.array(rgb)), ImageTransform(rgb.shape[:2])

    def transforms(self, images: Sequence[torch.Tensor], features: FeatureMaps) -> list[ImageTransform]:
        return [ImageTransform((64, 64)) for _ in images]

    def twin(self, suppression: Suppression) -> object:
        def call(images: Sequence[torch.Tensor]) -> list[Detections]:
            levels = tuple(level.expand(len(images), -1, -1, -1) for level in self.maps)
            candidates = Detections(self.boxes, torch.linspace(1, 0.1, 50), torch.ones(50, dtype=torch.int64))
            return suppression(FeatureMaps(levels, (4, 8, 16), ((64, 64),) * len(images)), [candidates] * len(images))

        return call


def stub() -> Stub:
    return Stub()


class Run(NamedTuple):
    """What was seen of a training: seconds to its first checkpoint, steps and seconds of its epoch (as far as it went),
    and the most memory of one process, in MB, until the middle of that time and until its end."""

    start: float
    steps: int
    seconds: float
    middle: float
    peak: float


def watched(words: Sequence[str], output: Path, processes: int, *, stop_after: int = 10**9) -> Run:
    """Train in ``output`` and watch; stopped when a checkpoint is ``stop_after`` steps into the first epoch."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
    began, start, steps, peaks = time.time(), 0.0, 0, []
    process = subprocess.Popen(
        [sys.executable, "-m", *launcher, "iou_refiner", "train", *words, "-o", str(output), "--checkpoint-minutes",
         "0.02"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and steps < stop_after:
        peaks.append(max(map(_resident, _family(process.pid))))
        if (output / "last.pt").exists():
            start = start or time.time() - began
            steps = torch.load(output / "last.pt")["begun"]["steps"]
        time.sleep(0.2)
    seconds = time.time() - began - start
    process.terminate()
    if process.wait() and steps < stop_after:
        raise SystemExit(process.returncode)
    if (output / "metrics.jsonl").exists():
        seconds = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])["seconds"]
    return Run(start, steps, seconds, max(peaks[: len(peaks) // 2]), max(peaks))


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(each for child in children for each in _family(int(child)))]


def _resident(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def rates(images: int) -> None:
    """One process and two, without and with threads, cached and live."""
    print("| features | processes | workers | images a second | MB a process |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = json.loads((_PHOTOGRAPHS / "instances_train.json").read_text())
        data["images"] = data["images"][:images]
        known = {image["id"] for image in data["images"]}
        data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in known]
        (place / "few.json").write_text(json.dumps(data))
        words = ["--detector", _LITE0, "--ann", str(place / "few.json"), "--images", str(_PHOTOGRAPHS / "images"),
                 "--views", "1", "--epochs", "1", "--no-siblings"]  # fmt: skip
        watched([*words, "--cache", str(place / "cache")], place / "fill", 1)
        for features, cache in (("cached", str(place / "cache")), ("live", "none")):
            for processes in (1, 2):
                for workers in (0, 2):
                    more = ["--cache", cache, "--workers", str(workers)]
                    run = watched([*words, *more], place / f"{features}{processes}{workers}", processes)
                    rate = images / run.seconds
                    print(f"| {features} | {processes} | {workers} | {rate:.1f} | {run.peak:.0f} |", flush=True)


def coco(steps: int) -> None:
    """A data set of COCO's size, on which ``steps`` steps of 8 images are trained."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=ROOT.parent) as folder:
        place = Path(folder)
        (place / "images").mkdir()
        PILImage.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(place / "picture.png")
        names = [f"{number:012d}.png" for number in range(_COCO_IMAGES)]
        for number, name in enumerate(names):  # a file has no more than 65,000 names
            if number % 60_000 == 0:
                original = place / "images" / name
                original.write_bytes((place / "picture.png").read_bytes())
            else:
                os.link(original, place / "images" / name)
        images = [{"id": n, "file_name": name, "width": 64, "height": 64} for n, name in enumerate(names)]
        sides = rng.uniform(4, 24, (_COCO_BOXES, 2)).round(1).tolist()
        places = rng.uniform(0, 40, (_COCO_BOXES, 2)).round(1).tolist()
        annotations = [
            {"id": n + 1, "image_id": n % _COCO_IMAGES, "category_id": 1, "iscrowd": 0, "bbox": [*corner, *side],
             "area": side[0] * side[1]}
            for n, (corner, side) in enumerate(zip(places, sides, strict=True))
        ]  # fmt: skip
        text = json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]})
        (place / "annotation.json").write_text(text)
        words = [
            "--detector", "scripts.bench.training:stub", "--ann", str(place / "annotation.json"), "--images",
            str(place / "images"), "--views", "1", "--epochs", "2", "--cache", "none", "--width", "4", "--hidden", "8",
            "--boxes-per-image", "8",
        ]  # fmt: skip
        run = watched(words, place / "out", 1, stop_after=steps)
    rate = 8 * run.steps / run.seconds
    print(f"first checkpoint after {run.start:.1f} s; {run.steps} steps, {rate:.0f} images a second")
    print(f"memory {run.middle:.0f} MB in the first half, {run.peak:.0f} MB in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "coco"])
    parser.add_argument("--images", type=int, default=64, help="of the rates")
    parser.add_argument("--steps", type=int, default=2000, help="after which COCO's size is left")
    options = parser.parse_args()
    rates(options.images) if options.what == "rates" else coco(options.steps)
