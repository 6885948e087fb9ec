"""What bench.py measures: each row names the work, its peer, its limit, and how its result is checked."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import batched_nms, roi_align

from iou_refiner import Detections, FeatureMaps, FeaturePyramid, IoUPredictor, Stage, prroi_pool
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.coco import Category, GroundTruth, Image, Results, read_results, write_results
from iou_refiner.data import Frame
from iou_refiner.extraction import Extraction
from iou_refiner.nms import iou_guided_nms, nms, soft_nms
from iou_refiner.pooling import assign_levels
from iou_refiner.refine import refine_boxes
from iou_refiner.rescoring import rescore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import prroi_pool_reference, soft_nms_reference

HEIGHT, WIDTH, BINS = 800, 1066, 7
STRIDES = (4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Work:
    """Two functions to race. The ratio is ``times * ours / (theirs + plus * times * ours)``."""

    name: str
    peer: str
    limit: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    check: Callable[[], None]
    times: float = 1.0
    plus: float = 0.0


def coco_boxes(count: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Boxes of 20 to 490 px, 70 % of them about 15 objects."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator)
    side, aspect = torch.exp(draw(count) * 3.2 + 3) * min(1, height / HEIGHT), torch.exp((draw(count) - 0.5) * 0.7)
    size = torch.stack([(side * aspect).clamp(max=width - 2), (side / aspect).clamp(max=height - 2)], 1)
    corner = draw(count, 2) * (torch.tensor([width, height]) - size)
    boxes = torch.cat([corner, corner + size], 1)
    near = int(count * 0.7)
    objects = torch.randint(0, min(15, count), (near,), generator=generator)
    boxes[count - near :] = boxes[objects] + size[objects].repeat(1, 2) * (draw(near, 4) - 0.5) * 0.2
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def clusters(count: int, classes: int = 80) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes about one object for every 20, their scores and ranks without ties, and their classes."""
    generator = torch.Generator().manual_seed(0)
    objects = coco_boxes(max(count // 20, 5))
    label = torch.randint(0, classes, (len(objects),), generator=generator)
    own = torch.randint(0, len(objects), (count,), generator=generator)
    size = (objects[:, 2:] - objects[:, :2])[own]
    boxes = objects[own] + size.repeat(1, 2) * torch.randn(count, 4, generator=generator) * 0.1
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], 1)
    scores, ranks = ((torch.randperm(count, generator=generator) + 1) / (count + 1) for _ in range(2))
    return boxes, scores, ranks, label[own]


def random_maps(channels: int, strides: tuple[float, ...], device: torch.device) -> FeatureMaps:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, channels, -(-HEIGHT // int(s)), -(-WIDTH // int(s))) for s in strides]
    return FeatureMaps(
        tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes), strides, ((HEIGHT, WIDTH),)
    )


def align(levels: tuple[Tensor, ...], strides: tuple[float, ...], boxes: Tensor, level: Tensor) -> list[Tensor]:
    return [
        roi_align(feature, [boxes[level == index]], BINS, 1 / stride, 2, True)
        for index, (feature, stride) in enumerate(zip(levels, strides, strict=True))
    ]


def check_pooling(maps: FeatureMaps, boxes: Tensor, level: Tensor, pooled: Tensor) -> None:
    for row in range(0, len(boxes), len(boxes) // 3):
        feature = maps.levels[int(level[row])][0, :2].double().cpu().numpy()
        cells = boxes[row].double().cpu().numpy() / maps.strides[int(level[row])] - 0.5
        error = np.abs(pooled[row, :2].detach().cpu().numpy() - prroi_pool_reference(feature, cells, BINS)).max()
        assert error <= 2e-6 * np.ptp(feature), error


def pooling(
    channels: int, strides: tuple[float, ...], count: int, limit: float, device: torch.device
) -> Iterator[Work]:
    maps, boxes = random_maps(channels, strides, device), coco_boxes(count).to(device)
    level, pyramid = assign_levels(boxes, strides), FeaturePyramid.from_maps(maps)
    pool = partial(prroi_pool, pyramid, boxes, level=level)
    peer = partial(align, maps.levels, strides, boxes, level)
    name = f"{'FPN' if len(strides) > 1 else 'stride 16'}, C {channels}, {count} boxes"
    yield Work(
        f"pool forward, {name}",
        "roi_align, 2 samples",
        limit,
        pool,
        peer,
        lambda: check_pooling(maps, boxes, level, pool()),
    )
    if channels == 256:
        leaves = tuple(feature.clone().requires_grad_() for feature in maps.levels)
        aligned, moving = align(leaves, strides, boxes, level), boxes.clone().requires_grad_()
        upstream = torch.randn(count, channels, BINS, BINS, device=device).to(memory_format=torch.channels_last)
        parts = [upstream[level == index].contiguous() for index in range(len(strides))]

        def both() -> Tensor:
            return torch.autograd.grad(prroi_pool(pyramid, moving, level=level), moving, upstream)[0]

        def check() -> None:
            half, step = 0.02, torch.randn(boxes.shape, generator=torch.Generator().manual_seed(1)).to(device)
            ends = [
                (prroi_pool(pyramid, boxes + s * half * step, level=level) * upstream).double().sum() for s in (1, -1)
            ]
            change = float(ends[0] - ends[1]) / (2 * half)
            assert abs(float((both() * step).double().sum()) - change) <= 0.02 * abs(change), change

        yield Work(
            f"pool forward + box gradient, {name}", "roi_align backward, to features", 0.25, both,
            lambda: torch.autograd.grad(aligned, leaves, parts, retain_graph=True), check,
        )  # fmt: skip
    if count == 1000:
        table = pyramid.table[: maps.levels[0][0, 0].numel()]
        same = torch.equal(table, maps.levels[0][0].flatten(1).t())
        yield Work(
            "table prepared, once an image",
            "roi_align of 1000 boxes",
            0.15,
            partial(FeaturePyramid.from_maps, maps),
            peer,
            lambda: ensure(same),
        )


def ensure(truth: bool) -> None:
    assert truth, "a contender's result is wrong"


def lively(head: IoUPredictor) -> IoUPredictor:
    """With a steeper output: an untrained head changes so little that its boxes converge at once, at no cost."""
    with torch.no_grad():
        head.output.weight *= 30
    return head.eval()


def refinement(device: torch.device) -> Iterator[Work]:
    maps, boxes = random_maps(256, (*STRIDES, 64.0), device), coco_boxes(100).to(device)
    torch.manual_seed(0)
    head = lively(IoUPredictor((256,) * 5, maps.strides)).to(device)
    index = torch.zeros(100, dtype=torch.int64, device=device)
    with torch.no_grad():
        pyramid = head.encode(maps)
    box_head = nn.Sequential(nn.Linear(256 * BINS**2, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()).to(device)
    level = assign_levels(boxes, STRIDES)

    def ours() -> Any:  # tolerance 0: every box goes all five steps
        return refine_boxes(lambda b, r: head.iou(head(pyramid, b, index[r])), boxes, steps=5, tolerance=0.0)

    @torch.no_grad()
    def theirs() -> Tensor:
        return box_head(torch.cat(align(maps.levels[:4], STRIDES, boxes, level)).flatten(1))

    def check() -> None:
        found = ours()
        ensure(found.forwards == 6 and bool((found.score >= found.start_score).all()) and int(found.moved.sum()) > 50)

    yield Work("refine 100 boxes, 5 steps", "roi_align + 2 x FC1024", 1.5, ours, theirs, check)


def whole_stage(name: str, limit: float, device: torch.device) -> Iterator[Work]:
    model = getattr(detection, name)(weights=None, weights_backbone=None).to(device).eval()
    size = (HEIGHT, WIDTH) if "resnet" in name else (320, 427)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    maps, _, _ = TorchvisionAdapter(model).extract([image])
    boxes, scores, _, labels = clusters(1000)
    boxes = (boxes * (size[0] / HEIGHT)).clamp(min=0).to(device)
    given = Detections(boxes, scores.to(device), labels.to(device))
    torch.manual_seed(0)
    stage = Stage(lively(IoUPredictor(maps.channels, maps.strides)).to(device))

    def check() -> None:
        (found,) = stage(maps, [given])
        ensure(0 < len(found) <= 100 and stage.summary.moved > 10 and bool(torch.isfinite(found.boxes).all()))

    yield Work(
        f"whole stage, 1000 candidates, on {name}", "the detector, with its own suppression", limit,
        lambda: stage(maps, [given]), torch.no_grad()(lambda: model([image])), check,
    )  # fmt: skip
    if "resnet" in name:
        yield from rescoring(maps, lambda: (torch.no_grad()(model)([image]), stage(maps, [given])))


def suppression(device: torch.device) -> Iterator[Work]:
    for count, limit in ((1000, 1.5), (10_000, 2.5), (100_000, 4.0)):
        boxes, scores, ranks, labels = (column.to(device) for column in clusters(count))
        peer = partial(batched_nms, boxes, ranks, labels, 0.5)
        yield Work(
            f"iou_guided_nms, {count} boxes of 80 classes", "torchvision batched_nms", limit,
            partial(iou_guided_nms, boxes, scores, ranks, labels), peer,
            lambda b=boxes, r=ranks, la=labels, p=peer: ensure(torch.equal(nms(b, r, la), p())),
        )  # fmt: skip
    from ensemble_boxes import soft_nms as ensemble

    boxes, scores, _, labels = clusters(1000)
    boxes = boxes.clamp(min=0) / 2000  # it wants [0, 1]

    def theirs() -> Any:
        columns = [boxes.numpy()], [scores.numpy()], [labels.numpy()]
        return ensemble(*columns, method=2, sigma=0.5, iou_thr=0.5, thresh=1e-3)

    def check() -> None:
        keep, ours = soft_nms(boxes, scores, labels)
        # Its kept boxes can be compared; the scores it returns are not the decayed ones, so ours go to the oracle.
        ensure(len(keep) == len(theirs()[0]))
        places = [tuple(box) for box in boxes.tolist()]
        exact = soft_nms_reference(
            places, scores.tolist(), labels.tolist(), lambda iou: math.exp(-(iou**2) / 0.5), 1e-3
        )
        ensure(bool(np.allclose(ours.numpy(), np.array(exact)[keep.numpy()], rtol=1e-5, atol=0)))

    yield Work(
        "soft_nms, 1000 boxes of 80 classes",
        "ensemble-boxes",
        0.2,
        partial(soft_nms, boxes, scores, labels),
        theirs,
        check,
    )


def rescoring(maps: FeatureMaps, per_image: Callable[[], Any], images: int = 5000, sample: int = 250) -> Iterator[Work]:
    """Reading, matching and writing a results file of ``sample`` images, against detector and stage on one of them."""
    folder = Path(tempfile.mkdtemp())
    none, names = np.zeros(0, np.int64), tuple(Category(i, str(i)) for i in range(80))
    files = tuple(Image(i, f"{i}.jpg", WIDTH, HEIGHT) for i in range(images))
    truth = GroundTruth(files, names, none, none, none, np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool))
    boxes, scores, _, labels = clusters(100 * sample)
    bbox = torch.cat([boxes[:, :2].clamp(min=0), boxes[:, 2:] - boxes[:, :2]], 1).double().numpy()
    saved = Results(np.repeat(np.arange(sample), 100), labels.numpy(), bbox, scores.double().numpy())
    write_results(folder / "in.json", saved)
    seen = partial(
        Extraction,
        features=maps,
        candidates=Detections(boxes[:0], scores[:0], labels[:0]),
        frame=Frame((HEIGHT, WIDTH)),
    )
    passing = Stage(lively(IoUPredictor(maps.channels, maps.strides)), moves=0, steps=0)

    def untouched(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return [found.replace(ious=found.scores) for found in candidates]

    untouched.settings = passing.settings  # type: ignore[attr-defined]

    def ours() -> Results:
        given = read_results(folder / "in.json")
        better = rescore(lambda image: seen(image.id), None, untouched, given, truth)  # type: ignore[arg-type]
        write_results(folder / "out.json", (whole := Results.concat(better)))
        return whole

    yield Work(
        f"rescore but for detector and head, an image ({sample} timed)", "the whole run (ResNet-50), an image", 0.02,
        ours, per_image, lambda: ensure(len(ours()) > 95 * sample), times=1 / sample, plus=1.0,
    )  # fmt: skip


def rows(device: torch.device, only: str) -> Iterator[Work]:
    """All rows whose group or name holds ``only``; a group is built when its turn comes."""
    groups = {
        "pool": lambda: (
            work
            for channels, strides, count, limit in (
                (256, STRIDES, 100, 0.28),
                (256, STRIDES, 1000, 0.28),
                (1024, (16.0,), 300, 0.2),
            )
            for work in pooling(channels, strides, count, limit, device)
        ),
        "refine": lambda: refinement(device),
        "nms": lambda: suppression(device),
        "stage mobilenet": lambda: whole_stage("fasterrcnn_mobilenet_v3_large_320_fpn", 0.25, device),
        "stage resnet rescore": lambda: whole_stage("fasterrcnn_resnet50_fpn", 0.1, device),
    }
    for group, build in groups.items():
        if only in group:
            yield from build()
