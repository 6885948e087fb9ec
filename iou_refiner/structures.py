"""What flows between detector and core: feature maps, detections, and the transform from image to network input.

Frozen dataclasses, validated once when they are made; everything after may rely on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from iou_refiner.boxes import clip_boxes
from iou_refiner.checks import check_boxes, check_positive, check_same_device, check_vector


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """The feature maps of a batch of images, finest level first.

    Args:
        levels: one tensor (N, C_l, H_l, W_l) per level, floating point, all on one device. Channels may differ.
        strides: pixels of the network input per cell, one per level. Cell ``i`` is centred at ``(i + 0.5) * stride``.
        image_sizes: ``(height, width)`` in pixels of each image inside the padded network input, N entries.

    Raises:
        ValueError: shapes, counts or devices disagree.
    """

    levels: tuple[Tensor, ...]
    strides: tuple[float, ...]
    image_sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        object.__setattr__(self, "strides", tuple(float(stride) for stride in self.strides))
        object.__setattr__(self, "image_sizes", tuple((int(h), int(w)) for h, w in self.image_sizes))
        if not self.levels or len(self.levels) != len(self.strides):
            raise ValueError(
                f"`strides` must give one stride per level: got {len(self.levels)} levels, {len(self.strides)} strides."
            )
        for index, level in enumerate(self.levels):
            name = f"levels[{index}]"
            if level.ndim != 4:
                raise ValueError(f"`{name}` must have shape (N, C, H, W), got {tuple(level.shape)}.")
            if not level.is_floating_point():
                raise TypeError(f"`{name}` must be floating point, got {level.dtype}.")
            if level.shape[0] != len(self.image_sizes):
                raise ValueError(
                    f"`{name}` holds {level.shape[0]} images but `image_sizes` has {len(self.image_sizes)} entries."
                )
            check_same_device(name, level, "levels[0]", self.levels[0])
            check_positive(f"strides[{index}]", self.strides[index])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_sizes)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(level.shape[1] for level in self.levels)

    @property
    def device(self) -> torch.device:
        """The device all levels are on."""
        return self.levels[0].device


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes of one image: a detector's candidates before suppression, or the detections after it.

    Args:
        boxes: (N, 4) float xyxy; network pixels inside the core.
        scores: (N,) float class scores in [0, 1].
        labels: (N,) int64, the detector's own class numbers.
        ious: (N,) float predicted IoU in [0, 1], or None where it is not predicted.
        source: (N,) int64, the row of the input each detection comes from, or None. It travels with the rows, so that
            what a stage returns can be joined with what it was given.

    Raises:
        ValueError: lengths or devices disagree.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    ious: Tensor | None = None
    source: Tensor | None = None

    def __post_init__(self) -> None:
        check_boxes("boxes", self.boxes)
        for name in ("scores", "labels", "ious", "source"):
            values = getattr(self, name)
            if values is not None:
                check_vector(name, values, len(self.boxes), like="boxes")
                check_same_device(name, values, "boxes", self.boxes)
        if self.labels.dtype != torch.int64:
            raise TypeError(f"`labels` must be int64, got {self.labels.dtype}.")

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.boxes)

    def __getitem__(self, rows: Tensor | slice) -> Detections:
        """The rows that an index tensor, a boolean mask or a slice selects."""
        return self._map(lambda values: values[rows])

    def replace(self, **changes: Tensor | None) -> Detections:
        """A copy with some fields exchanged."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on another device."""
        return self._map(lambda values: values.to(device))

    def to_dict(self) -> dict[str, Tensor]:
        """``boxes``, ``scores``, ``labels``, and ``ious`` where they are predicted: the result of torchvision's
        detectors."""
        columns = {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}
        return columns if self.ious is None else columns | {"ious": self.ious}

    def _map(self, change: Callable[[Tensor], Tensor]) -> Detections:
        columns = (getattr(self, field.name) for field in fields(self))
        return Detections(*(None if values is None else change(values) for values in columns))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageTransform:
    """The map from an image to the network input it became: ``network = image * scale + offset``, per axis.

    Covers resizing, letterboxing and padding. Transforms compose: ``a.then(b)`` applies ``a`` first.

    Args:
        image_size: ``(height, width)`` of the image, in its own pixels.
        scale: ``(x, y)`` network pixels per image pixel.
        offset: ``(x, y)`` network position of the image's origin.

    Law: ``transform.to_image(transform.to_network(boxes)) == boxes``.
    """

    image_size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for axis, scale in zip("xy", self.scale, strict=True):
            check_positive(f"scale ({axis})", scale)

    @classmethod
    def resize(cls, image_size: tuple[int, int], network_size: Sequence[int]) -> ImageTransform:
        """The transform of an image of ``image_size`` stretched to ``network_size``, both ``(height, width)``."""
        scale = (network_size[1] / image_size[1], network_size[0] / image_size[0])
        return cls((int(image_size[0]), int(image_size[1])), scale)

    def then(self, following: ImageTransform) -> ImageTransform:
        """The transform that applies this one, then ``following``."""
        scale = (self.scale[0] * following.scale[0], self.scale[1] * following.scale[1])
        offset = (
            self.offset[0] * following.scale[0] + following.offset[0],
            self.offset[1] * following.scale[1] + following.offset[1],
        )
        return ImageTransform(self.image_size, scale, offset)

    def to_network(self, boxes: Tensor) -> Tensor:
        """(N, 4) xyxy in image pixels to (N, 4) xyxy in network pixels."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.offset * 2)

    def to_image(self, boxes: Tensor) -> Tensor:
        """(N, 4) xyxy in network pixels to (N, 4) xyxy in image pixels."""
        return (boxes - boxes.new_tensor(self.offset * 2)) / boxes.new_tensor(self.scale * 2)

    def detections_to_image(self, detections: Detections) -> Detections:
        """Detections from network pixels to image pixels, clipped to the image."""
        return detections.replace(boxes=clip_boxes(self.to_image(detections.boxes), self.image_size))
