"""Runs ablations: the command line they share, and which of their runs are missing.

Each module beside this one is one ablation; as a command

    python -m scripts.ablations.boxes --detector faster_rcnn --cache cache/faster_rcnn

it measures every variant with every seed on the val split of coco-person, and appends one row for each to
``docs/results/ablations.jsonl``: ablation, variant, seed, settings, figures, seconds and commit. A run that has its row
is not repeated. ``python -m scripts.results.tables`` makes the tables of docs/accuracy.md from that file.

All heads of a training ablation see the same number of images, far fewer than the head that ships: a run costs one
minute on one core, and its figures are for comparing within an ablation, not for quoting.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from iou_refiner.detector.adapter import Suppression
from iou_refiner.head.checkpoint import load_head, save_head
from iou_refiner.head.iou_head import IoUHead
from iou_refiner.stage.stage import Stage
from scripts.ablations.records import Records, Row, Run
from scripts.ablations.testbed import COCO_PERSON, Testbed, small_detector
from scripts.ablations.variant import Variant

T = TypeVar("T")


def command_line(description: str | None) -> argparse.ArgumentParser:
    """The options of every ablation."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="feature cache; what is missing is extracted")
    parser.add_argument("--data", type=Path, default=COCO_PERSON, help="folder of images and annotations")
    parser.add_argument("--records", type=Path, default=Records.path, help="file that rows are appended to")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options that were given; the number of threads is set."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def run_training_ablation(ablation: str, variants: Mapping[str, Variant], description: str | None) -> None:
    """Train and measure a head of every variant, seed by seed."""
    options = parse(_with_runs(command_line(description)))
    records = Records(options.records)
    bed = Testbed(small_detector(options.detector), options.cache, options.data)
    for run, variant in _missing(ablation, range(options.seeds), lambda seed: variants, records, options):
        known = _known_default(records, run, options.passes) if variant == Variant() else None
        if known:
            records.append(known | asdict(run))
            continue
        began = time.time()
        head = bed.train_head(variant, run.seed, options.passes)
        figures = bed.measure_head(head, **variant.stage)
        records.add(run, time.time() - began, variant.to_dict() | {"passes": options.passes}, figures)
    print(f"{ablation}: done", file=sys.stderr)


def run_stage_ablation(
    ablation: str, stages: Callable[[Testbed, IoUHead], Mapping[str, Suppression]], description: str | None
) -> None:
    """Measure all stages with the default head of every seed, which is trained once and saved in the cache."""
    parser = _with_runs(command_line(description))
    parser.add_argument("--head", type=Path, help="measure with this head, not with one trained for each seed")
    options = parse(parser)
    records = Records(options.records)
    bed = Testbed(small_detector(options.detector), options.cache, options.data)
    about = {"head": options.head.parent.name} if options.head else {"passes": options.passes}

    def stages_of(seed: int) -> Mapping[str, Suppression]:
        path = options.head or options.cache / f"default-head-{options.passes}-{seed}.safetensors"
        if not path.exists():
            save_head(bed.train_head(Variant(), seed, options.passes), path)
        return stages(bed, load_head(path))

    for run, stage in _missing(ablation, range(1 if options.head else options.seeds), stages_of, records, options):
        began = time.time()
        ap = bed.measure_stage(stage)
        settings = asdict(stage.settings) if isinstance(stage, Stage) else {}
        records.add(run, time.time() - began, settings | about, {"stage": ap})
    print(f"{ablation}: done", file=sys.stderr)


def _with_runs(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--detector", default="faster_rcnn", choices=["faster_rcnn", "yolox"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1200, help="images every head sees in training")
    parser.add_argument("--only", nargs="*", help="variants to run; default: all")
    return parser


def _missing(
    ablation: str,
    seeds: range,
    variants: Callable[[int], Mapping[str, T]],
    records: Records,
    options: Any,
) -> Iterator[tuple[Run, T]]:
    """The runs that were asked for and have no row, with their variants."""
    for seed in seeds:
        for name, variant in variants(seed).items():
            run = Run(ablation, options.detector, name, seed)
            if run not in records and (not options.only or name in options.only):
                yield run, variant


def _known_default(records: Records, run: Run, passes: int) -> Row | None:
    """The row of the default head, if another ablation has measured it."""
    for row in records.rows():
        same = (row["detector"], row["seed"], row["settings"].get("passes")) == (run.detector, run.seed, passes)
        if same and row["variant"].startswith("default: "):
            return row
    return None
