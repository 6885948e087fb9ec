"""A detector and its IoU head trained together, in a plain torchvision loop.

    python examples/joint_training.py --ann my_train.json --images train2017 --output runs/joint

What a loop that trains the detector alone does not have: the head, ``IoURefiner`` around both, and ``save``. Images,
optimizer and schedule stay as they are; so would mixed precision and ``DistributedDataParallel``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from iou_refiner import IoURefiner
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.coco import read_ground_truth, xywh_to_xyxy
from iou_refiner.detector.images import open_image
from iou_refiner.training.joint import new_head


class Annotated(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images as torchvision takes them, with their boxes; labels count the categories from 1. Crowds are left out."""

    def __init__(self, ann: Path, images: Path):
        self.truth, self.folder = read_ground_truth(ann), images
        self.rows = self.truth.by_image()
        self.labels = {category.id: label for label, category in enumerate(self.truth.categories, 1)}

    def __len__(self) -> int:
        return len(self.truth.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.truth.images[index]
        rows = self.rows[image.id]
        rows = rows[~self.truth.iscrowd[rows]]
        labels = [self.labels[number] for number in self.truth.category_id[rows].tolist()]
        target = {
            "boxes": torch.from_numpy(xywh_to_xyxy(self.truth.bbox[rows])).float(),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        return torch.tensor(open_image(self.folder, image)).permute(2, 0, 1) / 255, target


def train(ann: Path, images: Path, output: Path, *, epochs: int, lr: float, pretrained: bool) -> IoURefiner:
    """Train a detector and a head for the categories of an annotation, and keep both in a folder."""
    data = Annotated(ann, images)
    options: dict[str, Any] = {} if pretrained else {"weights_backbone": None}
    detector = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, num_classes=1 + len(data.labels), **options)

    adapter = TorchvisionAdapter(detector.eval())
    head = new_head(adapter, [data[index][0] for index in range(min(4, len(data)))])
    refiner = IoURefiner(adapter, head).train()

    optimizer = torch.optim.AdamW(refiner.parameters(), lr=lr)
    for epoch in range(epochs):
        for batch in DataLoader(data, batch_size=2, shuffle=True, collate_fn=list):
            losses = refiner([image for image, _ in batch], [target for _, target in batch])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))
    refiner.eval().save(output)
    return refiner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ann", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--pretrained", action="store_true", help="start from the backbone's published weights")
    train(**vars(parser.parse_args()))
