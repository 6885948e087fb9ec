"""What scripts/train_detector.py learns from: annotated images, each time as another view."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.boxes import box_area, clip_boxes, valid_boxes
from iou_refiner.coco import GroundTruth, xywh_to_xyxy
from iou_refiner.detector.images import open_image
from iou_refiner.detector.views import View

# Share of an object that a window must show for it to be an object there.
_LEAST_VISIBLE = 0.25


class TrainingImages:
    """Annotated images as torchvision's detectors take them in training, each time as another view.

    Half of the time the image or its mirror image, else a window of it: an object then has many sizes and places.
    """

    def __init__(self, adapter: TorchvisionAdapter, folder: Path, truth: GroundTruth):
        self.adapter, self.folder, self.truth = adapter, folder, truth
        self._rows = truth.by_image()

    def __len__(self) -> int:
        return len(self.truth.images)

    def load(self, index: int, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels (3, H, W) in [0, 1], and the boxes (N, 4) xyxy and labels (N,) of what is there, crowds left out."""
        image = self.truth.images[index]
        number = 2 + epoch if torch.rand(()) < 0.5 else int(torch.randint(2, ()))
        view = View.of(image.id, (image.height, image.width), number)
        pixels, transform = self.adapter.prepare(view.pixels(open_image(self.folder, image)))
        rows = self._rows[image.id]
        rows = rows[~self.truth.iscrowd[rows]]
        whole = view.boxes(torch.from_numpy(xywh_to_xyxy(self.truth.bbox[rows])).float())
        visible = clip_boxes(whole, (view.height, view.width))
        chosen = valid_boxes(visible) & (box_area(visible) >= _LEAST_VISIBLE * box_area(whole))
        labels = torch.from_numpy(self.truth.category_id[rows])
        return pixels, {"boxes": transform.to_network(visible[chosen]), "labels": labels[chosen]}
