"""How time and memory grow with boxes, channels, image size, steps and images: figures and their numbers.

    python -m scripts.bench.scaling      (about 2 minutes on 2 idle CPU cores)

Writes docs/figures/scaling-*.svg and docs/results/scaling-cpu.json, figure by figure. Needs Linux (peak memory is read
from /proc) and matplotlib. Seconds are the best of three runs after one to warm up (of one where a run takes seconds);
memory is what the process grew by at its peak, above what it held before the call. Models and features are random; the
head is the default one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iou_refiner import Detections, FeatureMaps, FeatureTable, IoUHead, Stage, prroi_pool
from iou_refiner.coco import Category, GroundTruth, Image, Results
from iou_refiner.detector.features import Extraction
from iou_refiner.files import write_whole
from iou_refiner.pooling.functional import assign_levels
from iou_refiner.rescoring import rescore
from iou_refiner.stage.ascent import refine_boxes
from iou_refiner.stage.nms import iou_guided_nms
from iou_refiner.structures import ImageTransform
from scripts.bench.work import HEIGHT, STRIDES, WIDTH, clusters, coco_boxes, lively, random_maps

ROOT = Path(__file__).resolve().parents[2]
LEVELS = (*STRIDES, 64.0)
CPU = torch.device("cpu")
# Name of a figure, label of its axis, curve, value on the axis, and what to measure there.
Point = tuple[str, str, str, float, Callable[[], Any]]


def default_head(maps: FeatureMaps) -> IoUHead:
    torch.manual_seed(0)
    return lively(IoUHead(maps.channels, maps.strides))


def by_boxes() -> Iterator[Point]:
    maps = random_maps(256, LEVELS, CPU)
    head = default_head(maps)
    with torch.no_grad():
        table = head.encode(maps)
    for count in (10, 100, 1000, 10_000, 100_000):
        boxes, index = coco_boxes(count), torch.zeros(count, dtype=torch.int64)
        yield "boxes", "boxes", "IoU predicted", count, partial(head.predict, table, boxes, index)
        yield "boxes", "boxes", "IoU-guided NMS, 80 classes", count, partial(iou_guided_nms, *clusters(count))


def by_channels() -> Iterator[Point]:
    boxes = coco_boxes(1000)
    level = assign_levels(boxes, STRIDES)
    for channels in (32, 64, 128, 256, 512):
        table = FeatureTable.from_maps(random_maps(channels, STRIDES, CPU))
        yield "channels", "channels", "1,000 boxes pooled", channels, partial(prroi_pool, table, boxes, level=level)


def by_image_size() -> Iterator[Point]:
    for side in (200, 400, 800, 1600):
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 256, -(-side // int(s)), -(-side * 4 // (3 * int(s)))) for s in LEVELS]
        size = (side, side * 4 // 3)
        maps = FeatureMaps(tuple(torch.randn(shape, generator=generator) for shape in shapes), LEVELS, (size,))
        stage = Stage(default_head(maps))
        boxes, scores, _, labels = clusters(1000)
        candidates = [Detections(boxes.clamp(min=0) * (side / HEIGHT), scores, labels)]
        label = "shorter side of the image, px"
        yield "image", label, "encode", side, torch.no_grad()(partial(stage.head.encode, maps))
        yield "image", label, "whole stage, 1,000 candidates", side, partial(stage, maps, candidates)


def by_steps() -> Iterator[Point]:
    maps = random_maps(256, LEVELS, CPU)
    head, boxes = default_head(maps), coco_boxes(100)
    index = torch.zeros(100, dtype=torch.int64)
    with torch.no_grad():
        table = head.encode(maps)

    def score(boxes: Tensor, rows: Tensor) -> Tensor:
        return head(table, boxes, index[rows]).ranking

    for steps in (1, 2, 5, 10, 20):
        ascent = partial(refine_boxes, score, boxes, steps=steps, tolerance=0.0)
        yield "steps", "steps of the ascent", "100 boxes refined", steps, ascent


def by_images() -> Iterator[Point]:
    """Results of 100 boxes an image, on small maps: this shows whether an image leaves anything behind."""
    generator = torch.Generator().manual_seed(0)
    maps = FeatureMaps((torch.randn(1, 32, 40, 54, generator=generator),), (8.0,), ((320, 427),))
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    stage = Stage(default_head(maps), ascent_steps=0)

    def source(image: Image) -> Extraction:
        copy = FeatureMaps((maps.levels[0].clone(),), maps.strides, maps.image_sizes)
        return Extraction(image.id, copy, none, ImageTransform((HEIGHT, WIDTH)))

    def run(results: Results, truth: GroundTruth) -> int:
        return sum(map(len, rescore(source, None, stage, results, truth)))

    for count in (10, 100, 1000):
        yield "images", "images", "rescore", count, partial(run, *results_of(count))


def results_of(count: int) -> tuple[Results, GroundTruth]:
    """Results of 100 boxes on each of ``count`` images, and a ground truth of these images without annotations."""
    boxes, scores, _, labels = clusters(100 * count)
    corner, size = boxes[:, :2].clamp(min=0), boxes[:, 2:] - boxes[:, :2]
    bbox = torch.cat([corner, size], 1).double().numpy()
    results = Results(np.repeat(np.arange(count), 100), labels.numpy(), bbox, scores.double().numpy())
    images = tuple(Image(i, f"{i}.jpg", WIDTH, HEIGHT) for i in range(count))
    categories = tuple(Category(i, str(i)) for i in range(80))
    ids = np.zeros(0, np.int64)
    return results, GroundTruth(images, categories, ids, ids, ids, np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool))


def held(field: str) -> float:
    """MB the process holds now (VmRSS), or has held at most since it last forgot (VmHWM)."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) / 1024 if match else float("nan")


def measure(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MB at the peak above what was held before."""
    work()  # warm up: thread pools and caches are no part of the work
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = held("VmRSS"), []
    while not seconds or (len(seconds) < 3 and seconds[0] < 2):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), max(held("VmHWM") - before, 0.1)


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Seconds on the left, memory on the right, both logarithmic; greys and hues that read on white and on black."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    grey = "#808080"
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "scaling",
        "font.size": 9,
        "axes.prop_cycle": mpl.cycler(color=["#1f9e89", "#e07b39"]),
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), grey)
    with plt.rc_context(style):
        figure, panes = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
        for pane, column, unit in zip(panes, ("seconds", "megabytes"), ("seconds", "MB at the peak"), strict=True):
            for curve in dict.fromkeys(row["curve"] for row in rows):
                own = [row for row in rows if row["curve"] == curve]
                pane.loglog(
                    [row["at"] for row in own], [row[column] for row in own], marker="o", markersize=3, label=curve
                )
            pane.set(xlabel=rows[0]["axis"], ylabel=unit)
            pane.grid(color=grey, alpha=0.25, linewidth=0.5)
            pane.spines[["top", "right"]].set_visible(False)
            ticks = sorted({row["at"] for row in rows})
            pane.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            pane.minorticks_off()
        figure.legend(*panes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        figure.savefig(folder / f"scaling-{rows[0]['figure']}.svg", transparent=True, metadata={"Date": None})
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--only", default="", help="figures with this word in their name")
    parser.add_argument("--docs", default=ROOT / "docs", type=Path, help="where figures/ and results/ are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = [round(value, 1) for value in os.getloadavg()]
    about = f"cpu, {args.threads} threads of {os.cpu_count()} cores, load {load}"
    rows: list[dict[str, Any]] = []
    for folder in ("figures", "results"):
        (args.docs / folder).mkdir(parents=True, exist_ok=True)
    for series in (by_boxes, by_channels, by_image_size, by_steps, by_images):
        if args.only not in series.__name__:
            continue
        own: list[dict[str, Any]] = []
        for name, axis, curve, at, work in series():
            seconds, megabytes = measure(work)
            own.append(
                {"figure": name, "axis": axis, "curve": curve, "at": at, "seconds": seconds, "megabytes": megabytes}
            )
            print(f"{name} {at:,}, {curve}: {seconds:.4f} s, {megabytes:.1f} MB", file=sys.stderr)
        draw(own, args.docs / "figures")
        rows += own
        if not args.only:
            record = json.dumps({"about": about, "rows": rows}, indent=1)
            write_whole(args.docs / "results" / "scaling-cpu.json", record.encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
