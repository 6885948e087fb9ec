"""A detector so small that everything can be known about it, shared by the tests of the stage, training and the CLI.

Its "feature maps" are the image itself and its halves; its candidates are boxes around the bright rectangles drawn into
the image, moved at random. So a head can learn from it in seconds, and the truth is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from iou_refiner import Detections, FeatureMaps, Frame, IoUPredictor, jitter_boxes
from iou_refiner.boxes import clip_boxes, pairwise_iou, valid_boxes
from iou_refiner.detector.views import View
from iou_refiner.stage.nms import nms

SIZE, VIEWS = 64, 4


class ToyDetector(torch.nn.Module):
    """An adapter and a detector in one; `objects` remembers where the rectangles of each image are."""

    category_ids = None

    def __init__(self, objects: dict[bytes, np.ndarray]):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.objects = objects
        self.eval()

    @property
    def detector(self) -> ToyDetector:
        return self

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def fingerprint(self) -> str:
        return f"toy-{self.weight.item()}"

    def settings(self) -> str:
        return "none"

    def prepare(self, rgb: np.ndarray) -> tuple[torch.Tensor, Frame]:
        pixels = torch.from_numpy(_to_size(rgb)).permute(2, 0, 1).float() / 255
        return pixels, Frame.resize(rgb.shape[:2], (SIZE, SIZE))

    def extract(self, images: list[torch.Tensor]) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        batch = torch.stack(list(images))[:, :1] * self.weight.detach()
        half = torch.nn.functional.avg_pool2d(batch, 2)
        maps = FeatureMaps(
            (batch.expand(-1, 4, -1, -1), half.expand(-1, 4, -1, -1)), (1, 2), ((SIZE, SIZE),) * len(images)
        )
        return maps, [self._find(image) for image in images], [Frame((SIZE, SIZE)) for _ in images]

    def _find(self, image: torch.Tensor) -> Detections:
        boxes = self.objects[_key(image)]
        generator = torch.Generator().manual_seed(int(boxes.sum() * 1000) % 2**31)
        found, iou = jitter_boxes(torch.from_numpy(boxes).float(), 12, low=0.3, high=0.95, generator=generator)
        found, iou = clip_boxes(found.reshape(-1, 4), (SIZE, SIZE)), iou.reshape(-1)
        scores = (0.5 + 0.1 * iou + 0.3 * torch.rand(len(iou), generator=generator)).clamp(max=0.99)
        return Detections(found, scores, torch.ones(len(found), dtype=torch.int64))

    def run(self, stage, images):
        features, candidates, _ = self.extract(images)
        kept = stage(features, candidates)
        return [
            {"boxes": d.boxes, "scores": d.scores, "labels": d.labels} | ({} if d.ious is None else {"ious": d.ious})
            for d in kept
        ]

    def forward(self, images):
        return self.run(self.own_suppression, images)

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
    images, annotations, objects = [], [], {}
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
            objects[_to_size(view.pixels(pixels[:, :, None].repeat(3, 2)))[:, :, 0].tobytes()] = seen.numpy()
    path = folder / "annotation.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "rectangle"}]})
    )
    return path, ToyDetector(objects)


class OracleHead(IoUPredictor):
    """Knows the objects of each image: its "prediction" is the true IoU with the best of them."""

    def __init__(self, objects: list[torch.Tensor]):
        super().__init__(
            (4, 4), (1, 2), width=1, hidden=(2,), output_size=1, order=False, regress=False, objective="smooth_l1"
        )
        self.objects = objects

    def forward(self, pyramid, boxes, image_index, labels=None, level=None):
        rows = [
            pairwise_iou(box[None], self.objects[int(image)]).amax(1)
            for box, image in zip(boxes, image_index, strict=True)
        ]
        return 2 * torch.cat(rows) - 1 if rows else boxes.sum(1)
