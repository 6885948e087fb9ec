"""An adapter for a detector that no installed adapter knows, in twenty lines.

    iou-refiner train --detector examples/custom_adapter.py:adapter ...

``Centers`` stands for your detector: it predicts the sides of objects from the cells in their middle, as FCOS does. It
is left untrained here, with the same random weights each time. The adapter is what follows it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import ops

from iou_refiner import Detections, FeatureMaps, ImageTransform
from iou_refiner.adapters.custom import CustomAdapter

STRIDES = (8, 16)


class Centers(nn.Module):
    """Images (3, H, W) in [0, 1], of any sizes, to a list of ``{"boxes", "scores", "labels"}`` in their pixels."""

    def __init__(self, classes: int = 3, width: int = 16):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.BatchNorm2d(width), nn.SiLU())
        self.coarse = nn.Sequential(nn.Conv2d(width, width, 2, 2), nn.BatchNorm2d(width), nn.SiLU())
        self.sides, self.classes = nn.Conv2d(width, 4, 1), nn.Conv2d(width, classes, 1)
        self.score_thresh, self.nms_thresh, self.detections_per_img = 0.5, 0.5, 100

    def pad(self, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """A batch (B, 3, H, W), zeros below and to the right, and the ``(height, width)`` of each image in it."""
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        height, width = (-(-max(sides) // STRIDES[-1]) * STRIDES[-1] for sides in zip(*sizes, strict=True))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return batch, sizes

    def maps(self, batch: Tensor) -> list[Tensor]:
        """Feature maps, one per stride."""
        fine = self.fine(batch)
        return [fine, self.coarse(fine)]

    def predict(self, maps: list[Tensor], sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (N, 4) xyxy, scores (N,) and labels (N,) of each image, all above the threshold."""
        boxes, scores = [], []
        for level, stride in zip(maps, STRIDES, strict=True):
            rows, columns = (torch.arange(side, device=level.device) for side in level.shape[2:])
            center = (torch.cartesian_prod(rows, columns).flip(1) + 0.5) * stride
            sides = self.sides(level).flatten(2).mT.exp() * stride
            boxes.append(torch.cat([center - sides[..., :2], center + sides[..., 2:]], 2))
            scores.append(self.classes(level).flatten(2).mT.sigmoid())
        candidates = []
        for box, score, size in zip(torch.cat(boxes, 1), torch.cat(scores, 1), sizes, strict=True):
            box = ops.clip_boxes_to_image(box, size)
            valid = (box[:, 2:] > box[:, :2]).all(1, keepdim=True)
            row, label = torch.nonzero((score > self.score_thresh) & valid, as_tuple=True)
            candidates.append((box[row], score[row, label], label))
        return candidates

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections after greedy NMS, class by class."""
        batch, sizes = self.pad(images)
        results = []
        for boxes, scores, labels in self.predict(self.maps(batch), sizes):
            keep = ops.batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            results.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return results


# --- the adapter -----------------------------------------------------------------------------------------------------


def extract(detector: Centers, images: list[Tensor]) -> tuple[FeatureMaps, list[Detections], list[ImageTransform]]:
    """What the detector has before suppression: maps, candidates, and where each image lies in the batch."""
    batch, sizes = detector.pad(images)
    maps = detector.maps(batch)
    candidates = [Detections(*rows) for rows in detector.predict(maps, sizes)]
    return FeatureMaps(tuple(maps), STRIDES, tuple(sizes)), candidates, [ImageTransform(size) for size in sizes]


def adapter() -> CustomAdapter:
    """Ready for ``IoURefiner(adapter(), head=...)`` and for ``--detector``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        detector = Centers().eval()
    return CustomAdapter(detector, extract, settings=f"score_thresh={detector.score_thresh}")
