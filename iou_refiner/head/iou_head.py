"""The IoU head: a small network that predicts how well a box fits its object, and where a better box lies.

Three pieces, cheapest first: a 1x1 convolution per level narrows the detector's frozen feature maps to a common width,
once per image; Precise RoI Pooling pools a box from three successive levels, the finest of them the one that FPN
assigns to a box of its size; the trunk mixes what the bins hold, and two fully connected layers make it an embedding.

The paper pools one level of 256 channels into 2 x FC1024, and its first layer is 90 % of the cost of the ascent.
Narrowing before pooling costs the same as after it (both are linear), but is paid once per image, not per box and step.
Finer levels than these three hold four times the cells each, and nothing that a bin of a seventh of the box could keep;
three levels at scales that go with the box also look alike to the layers behind, whatever its size.

Three outputs share the trunk. The *IoU* of the box with its object. The *ranking* orders the boxes around one object:
it has no unit and says nothing about boxes of different objects, but which box of a cluster fits best, and which
direction leads uphill, it knows better than the IoU does. The *deltas* are one step of box regression, which moves
boxes further than the ascent does where there are few images to learn from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iou_refiner.boxes import DELTA_STDS, decode_boxes
from iou_refiner.checks import DataError
from iou_refiner.head.config import HeadConfig, HeadMetadata
from iou_refiner.head.trunk import Trunk
from iou_refiner.pooling.functional import assign_levels, prroi_pool
from iou_refiner.pooling.table import FeatureTable
from iou_refiner.siblings.config import SiblingConfig
from iou_refiner.siblings.sibling_net import SiblingNet
from iou_refiner.structures import FeatureMaps

# Boxes pooled at once when predicting without gradients: bounds memory, not results.
_CHUNK_BOXES = 1024


class Prediction(NamedTuple):
    """What a head says about R boxes.

    Attributes:
        iou: (R,) float32 predicted IoU with the object, in [0, 1].
        ranking: (R,) float32 in [0, 1], the order among the boxes of one object; the predicted IoU itself where the
            head did not learn a ranking.
    """

    iou: Tensor
    ranking: Tensor


class IoUHead(nn.Module):
    """Predicts the IoU of boxes with their objects.

    Args:
        channels: channels of each feature level, finest first.
        strides: pixels per cell of each level.
        config: the architecture; default :class:`HeadConfig`.
        num_classes: 0 for a class-agnostic head; otherwise each output has values for each label from 0 to K - 1.
        metadata: the detector it belongs to, recommended settings.
        siblings: the architecture of the network over siblings that judges the survivors of suppression, with what the
            trunk makes of them; None for a head without.

    Raises:
        ValueError: ``channels`` and ``strides`` disagree, or do not suit ``config``.

    Laws: the prediction for a box does not depend on the other boxes; it is continuously differentiable in the box
    while its levels stay the same, which :meth:`finest_level` can hold.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[float],
        config: HeadConfig | None = None,
        *,
        num_classes: int = 0,
        metadata: HeadMetadata | None = None,
        siblings: SiblingConfig | None = None,
    ):
        super().__init__()
        self.channels, self.strides = tuple(map(int, channels)), tuple(map(float, strides))
        self.config, self.metadata = config or HeadConfig(), metadata or HeadMetadata()
        self.num_classes = int(num_classes)
        if len(channels) != len(strides) or not channels:
            raise ValueError(f"`channels` and `strides` need one entry per level, got {len(channels)}, {len(strides)}.")
        width = self.config.width
        if width == 0 and len(set(channels)) != 1:
            raise ValueError(f"`width=0` pools the maps as they are and needs equal channels, got {tuple(channels)}.")
        self.num_levels = min(self.config.levels, len(self.channels))
        self.narrow = nn.ModuleList(nn.Conv2d(c, width, 1) if width else nn.Identity() for c in self.channels)
        bins, pooled = self.config.output_size**2, width or self.channels[0]
        self.trunk = Trunk(self.num_levels, bins, pooled, mix=self.config.mix, hidden=self.config.hidden)
        classes = max(self.num_classes, 1)
        self.iou_output = nn.Linear(self.trunk.out_features, classes)
        self.ranking_output = nn.Linear(self.trunk.out_features, classes) if self.config.ranking else None
        self.deltas_output = nn.Linear(self.trunk.out_features, 4 * classes) if self.config.deltas else None
        for output in (self.iou_output, self.ranking_output, self.deltas_output):
            if output is not None:
                nn.init.normal_(output.weight, std=0.01)
                nn.init.zeros_(output.bias)
        self.siblings = SiblingNet(siblings, embedding=self.trunk.out_features) if siblings else None

    @property
    def architecture(self) -> dict[str, Any]:
        """What the head is built from, as plain data."""
        return {
            "channels": list(self.channels), "strides": list(self.strides), "num_classes": self.num_classes,
            "config": asdict(self.config), "siblings": asdict(self.siblings.config) if self.siblings else None,
        }  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.iou_output.weight.device

    def encode(self, features: FeatureMaps) -> FeatureTable:
        """Narrow the maps and lay them out for pooling; once per batch of images, then predict for any boxes.

        The table is on the head's device and in its dtype, wherever the features are.

        Raises:
            DataError: the features do not have the channels and strides that the head was made for.
        """
        if features.channels != self.channels or features.strides != self.strides:
            raise DataError(
                f"The head was made for {len(self.channels)} levels of {self.channels} channels at strides "
                f"{self.strides}; these features have {features.channels} channels at strides {features.strides}. "
                "Use the detector it was trained on, or train a head for this one."
            )
        weight = self.iou_output.weight  # cached features may lie on another device, or be stored in half precision
        levels = tuple(level.to(weight) for level in features.levels)
        # On the CPU a 1x1 convolution copies a map before it multiplies, and would leave another to be laid out.
        layers: Iterable[nn.Module] = self.narrow if self.config.width else ()
        narrow = [(layer.get_parameter("weight").flatten(1), layer.get_parameter("bias")) for layer in layers]
        return FeatureTable.from_maps(FeatureMaps(levels, features.strides, features.image_sizes), narrow)

    def finest_level(self, boxes: Tensor) -> Tensor:
        """The finest of the levels each box is pooled from, (R,) int64.

        Choose it once, before an ascent, and pass it along: levels that changed on the way would make the objective
        jump.
        """
        last = len(self.strides) - self.num_levels
        return assign_levels(boxes, self.strides[: last + 1])

    def forward(
        self,
        table: FeatureTable,
        boxes: Tensor,
        image_index: Tensor,
        labels: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Prediction:
        """The prediction for each box, differentiable in the boxes.

        Args:
            table: from :meth:`encode`.
            boxes: (R, 4) float xyxy in network pixels.
            image_index: (R,) integer, the image of each box.
            labels: (R,) integer, the class of each box; needed by a class-aware head.
            level: (R,) from :meth:`finest_level`; default: chosen here.
        """
        embedding = self.roi_embedding(table, boxes, image_index, level)
        iou = self.to_iou(self.iou_logits(embedding, labels))
        return Prediction(iou, self.ranking_logits(embedding, labels).sigmoid() if self.config.ranking else iou)

    @torch.no_grad()
    def predict(
        self, table: FeatureTable, boxes: Tensor, image_index: Tensor, labels: Tensor | None = None
    ) -> Prediction:
        """:meth:`forward` for any number of boxes in bounded memory, without gradients.

        NaN where the features or the box are not finite.
        """
        parts = [Prediction(boxes.new_zeros(0), boxes.new_zeros(0))]
        for part in _chunks(len(boxes)):
            parts.append(self(table, boxes[part], image_index[part], None if labels is None else labels[part]))
        return Prediction(*map(torch.cat, zip(*parts, strict=True)))

    @torch.no_grad()
    def regress(self, table: FeatureTable, boxes: Tensor, image_index: Tensor, labels: Tensor | None = None) -> Tensor:
        """Better boxes (R, 4) for boxes (R, 4), by one step of box regression; not clipped to the image.

        Raises:
            ValueError: the head was made with ``deltas=False``, or is class-aware and ``labels`` are missing.
        """
        deltas = []
        for part in _chunks(len(boxes)):
            embedding = self.roi_embedding(table, boxes[part], image_index[part])
            deltas.append(self.deltas(embedding, None if labels is None else labels[part]))
        return decode_boxes(torch.cat(deltas), boxes) if deltas else boxes

    def roi_embedding(
        self, table: FeatureTable, boxes: Tensor, image_index: Tensor, level: Tensor | None = None
    ) -> Tensor:
        """What the trunk makes of each box, (R, hidden[-1]); arguments as :meth:`forward`."""
        if level is None:
            level = self.finest_level(boxes)
        count, border = self.num_levels, (boxes[:, 2:] - boxes[:, :2]) * ((self.config.context - 1) / 2)
        regions = torch.cat([boxes[:, :2] - border, boxes[:, 2:] + border], 1)
        pooled = prroi_pool(
            table,
            regions.repeat(count, 1),  # level by level, so that what is pooled from one lies together
            image_index=image_index.repeat(count),
            level=torch.cat([level + step for step in range(count)]),
            output_size=self.config.output_size,
            aligned=self.config.aligned,
        )
        rows = pooled.permute(0, 2, 3, 1).view(count, len(boxes), self.config.output_size**2, pooled.shape[1])
        embedding: Tensor = self.trunk(rows)
        return embedding

    def iou_logits(self, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """From an embedding (R, hidden[-1]): (R,) float32, monotone in the IoU; :meth:`to_iou` maps it to [0, 1].

        Raises:
            ValueError: the head is class-aware and ``labels`` are missing.
        """
        return self._of_class(self.iou_output(embedding), labels)[:, 0]

    def ranking_logits(self, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """From an embedding: (R,) float32, higher for the better of two boxes around one object.

        Raises:
            ValueError: the head was made with ``ranking=False``, or as :meth:`iou_logits`.
        """
        if self.ranking_output is None:
            raise ValueError("This head has no ranking. Make one with `ranking=True` to learn the order of boxes.")
        return self._of_class(self.ranking_output(embedding), labels)[:, 0]

    def deltas(self, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """From an embedding: (R, 4) float32, the deltas to a better box, see :func:`~iou_refiner.boxes.encode_boxes`.

        Raises:
            ValueError: the head was made with ``deltas=False``, or as :meth:`iou_logits`.
        """
        if self.deltas_output is None:
            raise ValueError("This head only predicts the IoU. Make one with `deltas=True` to predict better boxes.")
        deltas = self._of_class(self.deltas_output(embedding), labels)
        return deltas * deltas.new_tensor(DELTA_STDS)

    def _of_class(self, output: Tensor, labels: Tensor | None) -> Tensor:
        """Of an output of K classes (R, K * n): (R, n) float32, what it says for the class of each box."""
        if self.num_classes and labels is None:
            raise ValueError("`labels` must be given: this head predicts one IoU per class.")
        if labels is None or not self.num_classes:
            return output.float()
        by_class = output.float().view(len(output), self.num_classes, output.shape[1] // self.num_classes)
        return by_class[torch.arange(len(labels), device=labels.device), labels]

    def to_iou(self, logits: Tensor) -> Tensor:
        """IoU logits to the IoU in [0, 1]; NaN stays NaN."""
        return logits.sigmoid() if self.config.objective == "bce" else torch.clamp((logits + 1) / 2, 0, 1)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + _CHUNK_BOXES) for start in range(0, count, _CHUNK_BOXES)]
