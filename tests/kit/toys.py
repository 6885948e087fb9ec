"""A detector so small that everything can be known about it, shared by the tests of many folders.

Its "feature maps" are the image itself and its halves; its candidates are boxes around the bright rectangles drawn into
the image, moved at random. So a head can learn from it in seconds, and the truth is exact.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage

from iou_refiner import (
    Adapter,
    Detections,
    FeatureMaps,
    HeadConfig,
    ImageTransform,
    IoUHead,
    jitter_boxes,
)
from iou_refiner.boxes import clip_boxes, pairwise_iou, valid_boxes
from iou_refiner.coco import GroundTruth, read_ground_truth, xywh_to_xyxy
from iou_refiner.detector.adapter import Suppression
from iou_refiner.detector.images import open_image
from iou_refiner.detector.sources import CachedFeatures, FeatureCache
from iou_refiner.detector.views import View
from iou_refiner.head.iou_head import Prediction
from iou_refiner.stage.nms import nms

SIZE, VIEWS = 64, 4


class ToyDetector(torch.nn.Module, Adapter):
    """An adapter and a detector in one; ``gt_boxes`` remembers where the rectangles of each image are."""

    training: bool = False  # the module's own, in the place of the adapter's property

    def __init__(self, gt_boxes: dict[bytes, np.ndarray]):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.gt_boxes = gt_boxes
        self.suppression: Suppression = self.own_suppression
        self.eval()

    @property
    def detector(self) -> ToyDetector:
        return self

    def settings(self) -> str:
        return "none"

    def prepare(self, rgb: np.ndarray) -> tuple[torch.Tensor, ImageTransform]:
        pixels = torch.from_numpy(_to_size(rgb)).permute(2, 0, 1).float() / 255
        return pixels, ImageTransform.resize(rgb.shape[:2], (SIZE, SIZE))

    def twin(self, suppression: Suppression) -> ToyDetector:
        twin = copy.copy(self)
        twin.suppression = suppression
        return twin

    def transforms(self, images: list[torch.Tensor], features: FeatureMaps) -> list[ImageTransform]:
        return [ImageTransform((SIZE, SIZE)) for _ in images]

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        batch = torch.stack(list(images))[:, :1] * self.weight.detach()
        half = torch.nn.functional.avg_pool2d(batch, 2)
        levels = (batch.expand(-1, 4, -1, -1), half.expand(-1, 4, -1, -1))
        features = FeatureMaps(levels, (1, 2), ((SIZE, SIZE),) * len(images))
        candidates = [self._candidates(image) for image in images]
        return [detections.to_dict() for detections in self.suppression(features, candidates)]

    def _candidates(self, image: torch.Tensor) -> Detections:
        gt_boxes = self.gt_boxes[_key(image)]
        generator = torch.Generator().manual_seed(int(gt_boxes.sum() * 1000) % 2**31)
        boxes, iou = jitter_boxes(torch.from_numpy(gt_boxes).float(), 12, low=0.3, high=0.95, generator=generator)
        boxes, iou = clip_boxes(boxes.reshape(-1, 4), (SIZE, SIZE)), iou.reshape(-1)
        scores = (0.5 + 0.1 * iou + 0.3 * torch.rand(len(iou), generator=generator)).clamp(max=0.99)
        return Detections(boxes, scores, torch.ones(len(boxes), dtype=torch.int64))

    @staticmethod
    def own_suppression(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return [d[nms(d.boxes, d.scores, d.labels)] for d in candidates]


def _to_size(rgb: np.ndarray) -> np.ndarray:
    return np.array(PILImage.fromarray(rgb).resize((SIZE, SIZE), PILImage.Resampling.NEAREST))


def _key(image: torch.Tensor) -> bytes:
    return (image[0] * 255).round().byte().numpy().tobytes()


def make_dataset(folder: Path, count: int, *, seed: int = 0) -> tuple[Path, ToyDetector]:
    """Images of bright rectangles with their COCO annotation in ``folder``, and the detector that knows them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations, gt_boxes = [], [], {}
    for image_id in range(1, count + 1):
        pixels = rng.integers(0, 40, (SIZE, SIZE)).astype(np.uint8)
        boxes = []
        for quarter in rng.permutation(4)[: rng.integers(1, 3)]:
            x, y = 32 * (quarter % 2) + rng.integers(1, 8), 32 * (quarter // 2) + rng.integers(1, 8)
            w, h = rng.integers(10, 22, 2)
            pixels[y : y + h, x : x + w] = 220
            boxes.append([x, y, x + w, y + h])
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0, "area": int(w * h),
                 "bbox": [int(x), int(y), int(w), int(h)]}
            )  # fmt: skip
        name = f"{image_id}.png"
        PILImage.fromarray(np.repeat(pixels[:, :, None], 3, 2)).save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": SIZE, "height": SIZE})
        array = np.array(boxes, np.float64)
        for number in range(VIEWS):
            view = View.of(image_id, (SIZE, SIZE), number)
            seen = clip_boxes(view.boxes(torch.from_numpy(array)), (view.height, view.width))
            seen = seen[valid_boxes(seen)] * torch.tensor([SIZE / view.width, SIZE / view.height] * 2)
            gt_boxes[_to_size(view.pixels(pixels[:, :, None].repeat(3, 2)))[:, :, 0].tobytes()] = seen.numpy()
    path = folder / "annotation.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "rectangle"}]})
    )
    return path, ToyDetector(gt_boxes)


class ToyScene(NamedTuple):
    """Three images as the stage sees them, the truth about them, and where they come from."""

    features: FeatureMaps
    candidates: list[Detections]
    gt_boxes: list[torch.Tensor]
    detector: ToyDetector
    images: list[torch.Tensor]


def make_scene(folder: Path, count: int = 3) -> ToyScene:
    """A toy data set as one batch."""
    path, detector = make_dataset(folder, count)
    truth = read_ground_truth(path)
    images = [detector.prepare(open_image(folder, image))[0] for image in truth.images]
    features, candidates, _ = detector.extract(images)
    rows = truth.by_image()
    gt_boxes = [torch.from_numpy(xywh_to_xyxy(truth.bbox[rows[image.id]])).float() for image in truth.images]
    return ToyScene(features, candidates, gt_boxes, detector, images)


class ToyData(NamedTuple):
    """A toy data set on disk, whose first views are in a feature cache."""

    folder: Path
    truth: GroundTruth
    detector: ToyDetector
    cache: CachedFeatures


def make_cached(folder: Path, count: int = 12, *, views: int = 3) -> ToyData:
    """A toy data set whose features are cached."""
    path, detector = make_dataset(folder, count)
    truth, cache = read_ground_truth(path), FeatureCache(folder / "cache", detector).of(folder)
    for view in range(views):
        list(cache.fill(truth.images, view=view))
    return ToyData(folder, truth, detector, cache)


class OracleHead(IoUHead):
    """Knows the objects of each image: its prediction is the true IoU with the best of them."""

    def __init__(self, gt_boxes: list[torch.Tensor]):
        config = HeadConfig(width=1, hidden=(2,), output_size=1, ranking=False, deltas=False)
        super().__init__((4, 4), (1, 2), config)
        self.gt_boxes = gt_boxes

    def forward(self, table, boxes, image_index, labels=None, level=None):
        rows = [
            pairwise_iou(box[None], self.gt_boxes[int(image)]).amax(1)
            for box, image in zip(boxes, image_index, strict=True)
        ]
        iou = torch.cat(rows) if rows else boxes.sum(1)
        return Prediction(iou, iou)
