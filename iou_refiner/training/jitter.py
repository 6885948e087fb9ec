"""Training boxes spread evenly over IoU, with their true IoU.

The paper trains on ground-truth boxes moved at random and sampled uniformly in IoU (section 3.1). Drawing until the IoU
falls into a target stratum accepts 0.5 to 4 % of the draws. Here the direction of a move is drawn at random and its
*length* is solved for: along a ray from the object the IoU falls continuously from 1, so bisection hits any target IoU
exactly, for every box in one vectorised pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iou_refiner.boxes import decode_boxes, paired_iou
from iou_refiner.checks import check_boxes, check_fraction
from iou_refiner.training.settings import LOWEST_IOU

# Length of a ray in relative coordinates, and halvings of the search along it, which leave an error of 1e-6 in IoU.
_LONGEST, _BISECTIONS = 32.0, 27


def jitter_boxes(
    boxes: Tensor,
    count: int,
    *,
    low: float = 0.3,
    high: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Move every box ``count`` times so that the IoU with the original is uniform in [low, high].

    Args:
        boxes: (N, 4) float xyxy, valid.
        count: jittered boxes for each.
        low, high: range of the IoU, from :data:`~iou_refiner.training.settings.LOWEST_IOU` on.
        generator: source of randomness (on the CPU); default torch's global one.

    Returns:
        Jittered boxes (N, count, 4) and their true IoU with the original (N, count), exact for the boxes as returned.

    Raises:
        ValueError: bad shapes, or not ``LOWEST_IOU <= low <= high <= 1``.
    """
    check_boxes("boxes", boxes)
    check_fraction("low", low)
    check_fraction("high", high)
    if not LOWEST_IOU <= low <= high:
        raise ValueError(f"`low` must be at least {LOWEST_IOU} and at most `high`, got low={low}, high={high}.")
    reference = boxes.double().repeat_interleave(count, 0)  # (N * count, 4)
    # Directions in relative coordinates: shifts and log sizes are moved alike, as detectors err in both.
    direction = torch.randn(len(reference), 4, generator=generator, dtype=torch.float64).to(reference.device)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
    target = low + (high - low) * torch.rand(len(reference), generator=generator, dtype=torch.float64).to(
        reference.device
    )
    near, far = torch.zeros_like(target), torch.full_like(target, _LONGEST)
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2
        short = paired_iou(decode_boxes(direction * middle[:, None], reference), reference) > target
        near, far = torch.where(short, middle, near), torch.where(short, far, middle)
    jittered = decode_boxes(direction * near[:, None], reference).to(boxes.dtype)
    iou = paired_iou(jittered.double(), reference).to(boxes.dtype)
    return jittered.view(len(boxes), count, 4), iou.view(len(boxes), count)
