"""The demo's detector: a Faster R-CNN small enough to be trained from nothing while one waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from iou_refiner.checks import DataError, require
from iou_refiner.coco import GroundTruth, xywh_to_xyxy
from iou_refiner.demo.data import IMAGE_SIDE
from iou_refiner.detector.images import open_image
from iou_refiner.files import write_whole
from iou_refiner.progress import Progress, no_progress

_WIDTHS = (24, 32, 64, 96)  # channels at strides 2, 4, 8, 16
_CHANNELS = 48  # of the feature pyramid
_ANCHOR_SIDES = (28, 46, 76)  # pixels, one per level
_BATCH = 4
_LEARNING_RATE = 2e-3


class _Backbone(nn.Module):
    """Seven convolutions and a feature pyramid of strides 4, 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        ops = require("torchvision.ops", extra="demo", purpose="The demo")
        stem, *widths = _WIDTHS
        self.stem = _convolution(3, stem, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(_convolution(before, after, stride=2), _convolution(after, after))
            for before, after in zip(_WIDTHS[:-1], widths, strict=True)
        )
        self.fpn = ops.FeaturePyramidNetwork(widths, _CHANNELS)
        self.out_channels = _CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to maps named "0", "1", "2", finest first."""
        maps, cells = {}, self.stem(images)
        for index, stage in enumerate(self.stages):
            cells = stage(cells)
            maps[str(index)] = cells
        levels: dict[str, Tensor] = self.fpn(maps)
        return levels


def _convolution(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def build_detector() -> Any:
    """A torchvision Faster R-CNN with one class and untrained weights, which torch's global generator draws."""
    models = require("torchvision.models.detection", extra="demo", purpose="The demo")
    ops = require("torchvision.ops", extra="demo", purpose="The demo")
    faster_rcnn = models.faster_rcnn
    anchors = models.anchor_utils.AnchorGenerator(
        tuple((side,) for side in _ANCHOR_SIDES), ((0.6, 1.0, 1.7),) * len(_ANCHOR_SIDES)
    )
    # One sample a bin: the backward pass of more is half of all the time, and runs on one thread only.
    pool = ops.MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=1)
    return models.FasterRCNN(
        _Backbone(),
        min_size=IMAGE_SIDE,
        max_size=IMAGE_SIDE,
        rpn_anchor_generator=anchors,
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        rpn_nms_thresh=0.8,
        rpn_batch_size_per_image=64,
        box_roi_pool=pool,
        box_head=faster_rcnn.TwoMLPHead(_CHANNELS * 7 * 7, 128),
        box_predictor=faster_rcnn.FastRCNNPredictor(128, num_classes=2),
        box_batch_size_per_image=64,
        box_positive_fraction=0.5,
    )


def train_detector(
    folder: str | Path,
    ground_truth: GroundTruth,
    *,
    steps: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Any:
    """Train a detector from nothing: AdamW, one cycle of the learning rate, :data:`_BATCH` images a step.

    Args:
        folder: of the images.
        ground_truth: the annotation.
        steps: how many; a number and not a time, so that the result is the same anywhere.
        seed: of weights and order. Torch's global generator is left as it was.
        progress: called after each step, in the phase "training the detector".

    Returns:
        The detector, in inference mode.
    """
    images = [
        torch.from_numpy(open_image(folder, image).copy()).permute(2, 0, 1) / 255 for image in ground_truth.images
    ]
    targets = [_target(ground_truth, rows) for rows in ground_truth.by_image().values()]
    with torch.random.fork_rng(devices=[]):  # torchvision samples its anchors with the global generator
        torch.manual_seed(seed)
        detector = build_detector().train()
        optimizer = torch.optim.AdamW(detector.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
        order: list[int] = []
        for step in range(steps):
            while len(order) < _BATCH:
                order += torch.randperm(len(images)).tolist()
            chosen, order = order[:_BATCH], order[_BATCH:]
            losses = detector([images[i] for i in chosen], [targets[i] for i in chosen])
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            progress("training the detector", step + 1, steps)
    return detector.eval()


def _target(ground_truth: GroundTruth, rows: Any) -> dict[str, Tensor]:
    boxes = torch.from_numpy(xywh_to_xyxy(ground_truth.bbox[rows])).float()
    return {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}


def save_detector(detector: nn.Module, path: Path) -> None:
    """Write the weights to a safetensors file, whole or not at all."""
    weights = {name: tensor.contiguous() for name, tensor in detector.state_dict().items()}
    write_whole(path, safetensors.torch.save(weights))


def read_detector(path: Path) -> Any:
    """The detector that :func:`save_detector` wrote, in inference mode.

    Raises:
        DataError: the file is missing, damaged, or not of this detector.
    """
    with torch.random.fork_rng(devices=[]):
        detector = build_detector()
    try:
        detector.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{path} does not hold the demo's detector ({error}). Make it with: iou-refiner demo"
        ) from error
    return detector.eval()
