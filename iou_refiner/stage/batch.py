"""The boxes of a batch of images in one table, which is what the stage works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from iou_refiner.boxes import valid_boxes
from iou_refiner.head.iou_head import Prediction
from iou_refiner.structures import Detections


@dataclass(frozen=True, eq=False)
class FlatBatch:
    """R boxes of any number of images.

    Args:
        boxes: (R, 4) float32 xyxy in network pixels.
        scores: (R,) float class scores.
        labels: (R,) int64.
        image_index: (R,) int64, the image of each box.
        limits: (R, 4) float32, width and height of its image, twice: the largest x1, y1, x2, y2.
        row: (R,) int64, the row of each box among all candidates.
        iou: (R,) float32 predicted IoU; NaN where there is none.
        ranking: (R,) float32 predicted order among the boxes of one object; NaN where there is none.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image_index: Tensor
    limits: Tensor
    row: Tensor
    iou: Tensor
    ranking: Tensor

    @classmethod
    def of(
        cls, candidates: Sequence[Detections], image_sizes: Sequence[tuple[float, float]], device: torch.device
    ) -> FlatBatch:
        """The candidates of all images on one device, clipped to their images.

        Args:
            candidates: one entry per image.
            image_sizes: ``(height, width)`` of each image in network pixels.
            device: where the batch is to be.
        """
        counts = torch.tensor([len(detections) for detections in candidates])
        image_index = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)
        sizes = torch.tensor(image_sizes, dtype=torch.float32, device=device).reshape(-1, 2)
        limits = sizes.flip(1).repeat(1, 2)[image_index]
        boxes = torch.cat([detections.boxes for detections in candidates]).to(device).float()
        unknown = torch.full_like(boxes[:, 0], torch.nan)
        return cls(
            boxes=torch.minimum(boxes.clamp(min=0), limits),
            scores=torch.cat([detections.scores for detections in candidates]).to(device),
            labels=torch.cat([detections.labels for detections in candidates]).to(device),
            image_index=image_index,
            limits=limits,
            row=torch.arange(len(boxes), device=device),
            iou=unknown,
            ranking=unknown,
        )

    @classmethod
    def concat(cls, parts: Sequence[FlatBatch]) -> FlatBatch:
        """The rows of all parts, one part after the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.boxes)

    def __getitem__(self, rows: Tensor) -> FlatBatch:
        """The rows that an index tensor or a boolean mask selects."""
        return FlatBatch(*(getattr(self, field.name)[rows] for field in fields(self)))

    def replace(self, **columns: Tensor) -> FlatBatch:
        """A copy with some columns exchanged."""
        return replace(self, **columns)

    def with_prediction(self, prediction: Prediction) -> FlatBatch:
        """The same boxes with a head's prediction."""
        return self.replace(iou=prediction.iou, ranking=prediction.ranking)

    def moved_to(self, boxes: Tensor) -> FlatBatch:
        """The same rows with other boxes (R, 4), clipped to their images; a box that would be invalid stays."""
        boxes = torch.minimum(boxes.clamp(min=0), self.limits)
        return self.replace(boxes=torch.where(valid_boxes(boxes)[:, None], boxes, self.boxes))

    def updated(self, rows: Tensor, other: FlatBatch) -> FlatBatch:
        """A copy whose ``rows`` have the boxes and predictions of ``other``."""
        return self.replace(
            boxes=self.boxes.index_copy(0, rows, other.boxes),
            iou=self.iou.index_copy(0, rows, other.iou),
            ranking=self.ranking.index_copy(0, rows, other.ranking),
        )

    def finite(self) -> Tensor:
        """Mask (R,) of the boxes whose coordinates and score are finite."""
        return torch.isfinite(self.boxes).all(1) & torch.isfinite(self.scores)

    def group(self) -> Tensor:
        """A number (R,) int64 for each image and label: boxes of different groups never suppress each other."""
        if not len(self):
            return self.labels
        labels = self.labels - self.labels.min()
        return self.image_index * (labels.max() + 1) + labels

    def by_score(self) -> FlatBatch:
        """The rows image by image, by falling score within each; ties keep their order."""
        order = self.scores.argsort(descending=True, stable=True)
        return self[order[self.image_index[order].argsort(stable=True)]]

    def topk_rows(self, k: int) -> Tensor:
        """Of rows in the order of :meth:`by_score`: the first ``k`` of every image."""
        rows = torch.arange(len(self), device=self.boxes.device)
        first = torch.searchsorted(self.image_index, self.image_index)  # of the image's rows
        return rows[rows - first < k]

    def split(self, candidates: Sequence[Detections]) -> list[Detections]:
        """One :class:`Detections` per image, of the device, dtype and ``source`` of its candidates."""
        counts = torch.bincount(self.image_index, minlength=len(candidates)).tolist()
        columns = (column.split(counts) for column in (self.row, self.boxes, self.scores, self.iou))
        detections, first = [], 0
        for image, row, boxes, scores, iou in zip(candidates, *columns, strict=True):
            rows = image[(row - first).to(image.boxes.device)]
            detections.append(
                rows.replace(boxes=boxes.to(rows.boxes), scores=scores.to(rows.scores), ious=iou.to(rows.boxes.device))
            )
            first += len(image)
        return detections
