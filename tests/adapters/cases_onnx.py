"""The ONNX adapter as cases of the contract: one small graph of each layout, and a trained YOLOX.

The result of each detector by itself is computed here from the graph's own outputs, step by step for one layout alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor
from torchvision import ops

from iou_refiner import Detections, FeatureMaps
from iou_refiner.adapters.onnx import OnnxAdapter, OnnxLayout
from tests.adapters.case import Case, example, noise, photographs
from tests.adapters.onnx_graphs import tiny_detr, tiny_suppressed, tiny_yolov8, tiny_yolox

HEIGHT, WIDTH = 64, 96
SIZES = (50, 90), (200, 120), (64, 96)
MAPS = ("map8", "map16", "map32")


def resized(rgb: np.ndarray, height: int, width: int) -> Tensor:
    """(3, height, width) from 0 to 255."""
    pixels = torch.from_numpy(rgb).permute(2, 0, 1).float()[None]
    return torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear")[0]


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> dict[str, Tensor]:
    keep = ops.batched_nms(boxes, scores, labels, threshold)
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def to_image(boxes: Tensor, scale: tuple[float, float], offset: tuple[int, int], rgb: np.ndarray) -> Tensor:
    boxes = (boxes - torch.tensor(offset * 2)) / torch.tensor(scale * 2)
    return ops.clip_boxes_to_image(boxes, rgb.shape[:2])


def yolov8(session: Any, rgb: np.ndarray, threshold: float) -> dict[str, Tensor]:
    height, width = rgb.shape[:2]
    gain = min(HEIGHT / height, WIDTH / width)
    inner = round(height * gain), round(width * gain)
    top, left = (round((side - part) / 2 - 0.1) for side, part in zip((HEIGHT, WIDTH), inner, strict=True))
    canvas = torch.full((3, HEIGHT, WIDTH), 114.0)
    canvas[:, top : top + inner[0], left : left + inner[1]] = resized(rgb, *inner)
    (output,) = session.run(None, {"images": (canvas * (1 / 255))[None].numpy()})
    x, y, w, h, *classes = torch.from_numpy(output)[0]
    sides = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    limits = [(left, left + inner[1]), (top, top + inner[0])] * 2
    boxes = torch.stack([side.clamp(*limit) for side, limit in zip(sides, limits, strict=True)], 1)
    valid = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))[:, None]
    scores = torch.stack(classes, 1)
    rows, labels = torch.nonzero((scores > threshold) & valid, as_tuple=True)
    result = suppressed(boxes[rows], scores[rows, labels], labels, 0.7)
    scale = inner[1] / width, inner[0] / height
    return result | {"boxes": to_image(result["boxes"], scale, (left, top), rgb)}


def squashed(rgb: np.ndarray) -> tuple[Tensor, tuple[float, float]]:
    scale = WIDTH / rgb.shape[1], HEIGHT / rgb.shape[0]
    return resized(rgb, HEIGHT, WIDTH) * (1 / 255), scale


def detr(session: Any, rgb: np.ndarray, threshold: float) -> dict[str, Tensor]:
    pixels, scale = squashed(rgb)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    logits, boxes = map(torch.from_numpy, session.run(None, {"images": ((pixels - mean) / std)[None].numpy()}))
    boxes = ops.box_convert(boxes[0], "cxcywh", "xyxy") * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    scores = logits[0].softmax(1)[:, :3]
    rows, labels = torch.nonzero(scores > threshold, as_tuple=True)
    order = scores[rows, labels].argsort(descending=True)
    boxes = ops.clip_boxes_to_image(boxes[rows][order], (HEIGHT, WIDTH))
    boxes = to_image(boxes, scale, (0, 0), rgb)
    return {"boxes": boxes, "scores": scores[rows, labels][order], "labels": labels[order]}


def suppressed_in_graph(session: Any, rgb: np.ndarray, threshold: float) -> dict[str, Tensor]:
    pixels, scale = squashed(rgb)
    boxes, labels, scores = map(torch.from_numpy, session.run(None, {"images": pixels.numpy()}))
    boxes = ops.clip_boxes_to_image(boxes, (HEIGHT, WIDTH))
    order = scores.argsort(descending=True)
    valid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & (scores > threshold)
    order = order[valid[order]]
    return {"boxes": to_image(boxes[order], scale, (0, 0), rgb), "scores": scores[order], "labels": labels[order]}


class OnnxCase(Case):
    """An exported detector is the adapter itself; ``reference`` is what its users would write."""

    package, replaced = "onnxruntime", "the adapter's own greedy NMS, where the layout has one"

    def __init__(self, adapter: OnnxAdapter, rgb: list[np.ndarray], reference: Any = None):
        super().__init__(adapter, rgb)
        self.session = onnxruntime.InferenceSession(adapter.path.read_bytes()) if reference else None
        self.reference = reference

    def call(self, detector: Any, images: Any) -> Any:
        if detector is not self.adapter or self.reference is None:
            return super().call(detector, images)
        return [self.reference(self.session, rgb, self.adapter.layout.score_threshold) for rgb in images]

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        return self.adapter.suppress(features, candidates)

    def silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(self.adapter, "layout", self.adapter.layout.replace(score_threshold=1.0))


def made(model: Any, reference: Any, layout: OnnxLayout | str, **changes: Any) -> Case:
    with tempfile.TemporaryDirectory() as folder:  # the file is read when the adapter is made, and not again
        path = Path(folder) / "tiny.onnx"
        onnx.save(model, path)
        return OnnxCase(OnnxAdapter(path, layout, **changes), noise(*SIZES), reference)


def made_suppressed() -> Case:
    layout = OnnxLayout(boxes="boxes", scores="scores", labels="labels", features=MAPS, nms_threshold=None)
    with pytest.warns(UserWarning, match="nothing left to suppress"):
        return made(tiny_suppressed(), suppressed_in_graph, layout)


CASES: dict[str, Callable[[], Case]] = {
    "yolox": lambda: made(tiny_yolox(), None, "yolox"),
    "yolov8": lambda: made(tiny_yolov8(), yolov8, "yolov8", features=MAPS),
    "detr": lambda: made(tiny_detr(), detr, "detr", features=MAPS),
    "suppressed in the graph": made_suppressed,
    "trained yolox": lambda: OnnxCase(example("yolox"), photographs()),
}
