"""Views of an image to train on: the image itself, its mirror image, then windows of it at random places.

A frozen detector's features of one image are always the same, and a head soon overfits to them. Another window of the
image shows the same objects at another scale, at other cells and in other context: on few images this is what keeps the
head learning. A view is a function of image and number alone, so that a cache knows what it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Side of a window over that of the image, and how far its shape may differ from the image's (log of the ratio).
_SIDE, _STRETCH = (0.5, 0.95), 0.25


@dataclass(frozen=True)
class View:
    """A window of an image, perhaps mirrored left to right.

    Attributes:
        left, top: its corner, whole pixels of the image.
        width, height: its size, whole pixels.
        mirrored: whether left and right change places.
    """

    left: int
    top: int
    width: int
    height: int
    mirrored: bool = False

    @classmethod
    def of(cls, image_id: int, size: tuple[int, int], number: int) -> View:
        """View ``number`` of an image of ``size`` (height, width) pixels.

        0 is the image itself, 1 its mirror image; from 2 on come random windows, half of them mirrored.
        """
        height, width = size
        if number < 2:
            return cls(0, 0, width, height, mirrored=number == 1)
        random = np.random.default_rng([abs(image_id), number])
        side, stretch = random.uniform(*_SIDE), np.exp(random.uniform(-_STRETCH, _STRETCH))
        inner_width = max(1, min(width, round(width * side * stretch)))
        inner_height = max(1, min(height, round(height * side / stretch)))
        left = int(random.integers(0, width - inner_width + 1))
        top = int(random.integers(0, height - inner_height + 1))
        return cls(left, top, inner_width, inner_height, bool(random.integers(0, 2)))

    def pixels(self, rgb: np.ndarray) -> np.ndarray:
        """What the view shows of an image (H, W, 3): (height, width, 3), contiguous."""
        window = rgb[self.top : self.top + self.height, self.left : self.left + self.width]
        return np.ascontiguousarray(window[:, ::-1] if self.mirrored else window)

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) xyxy in pixels of the image, in pixels of the view; not clipped to it."""
        moved = boxes - boxes.new_tensor([self.left, self.top, self.left, self.top])
        if not self.mirrored:
            return moved
        return torch.stack([self.width - moved[:, 2], moved[:, 1], self.width - moved[:, 0], moved[:, 3]], 1)
