"""Two small trained detectors, as adapters: try the package on photographs within minutes.

    iou-refiner train --detector examples/small_detectors.py:faster_rcnn ...
    iou-refiner train --detector examples/small_detectors.py:faster_rcnn:runs/nuclei/best.safetensors ...

``faster_rcnn`` scores boxes by class alone, the situation IoU-Net was made for; the class scores of ``yolox`` were
trained to hold a little of the IoU already. ``faster_rcnn`` detects people, or what scripts/train_detector.py trained
it for. Weights and photographs lie in a folder ``shared`` beside the checkout, or in the folder that the environment
variable IOU_REFINER_SHARED names.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open

from iou_refiner.adapters.onnx import OnnxAdapter
from iou_refiner.adapters.torchvision import TorchvisionAdapter

#: Where weights and photographs lie.
SHARED = Path(os.environ.get("IOU_REFINER_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODELS = SHARED / "models"
#: Longest side in pixels of the images that weights were trained on, where they do not say.
SIZE = 320


def network(num_classes: int, size: int = SIZE) -> Any:
    """torchvision's Faster R-CNN on EfficientNet-Lite0 with ImageNet's weights, untrained beyond them.

    Labels are 1 to ``num_classes``; images have ``size`` pixels on their longest side.
    """
    spec = importlib.util.spec_from_file_location("frcnn_lite0", MODELS / "frcnn_lite0.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{MODELS / 'frcnn_lite0.py'} is not a Python module.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(num_classes, size)


def faster_rcnn(weights: str | Path = MODELS / "frcnn_lite0_person.safetensors") -> TorchvisionAdapter:
    """That network trained on people (label 1), or by scripts/train_detector.py, which notes the size of its images."""
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        size = int((file.metadata() or {}).get("size", SIZE))
    detector = network(len(tensors["roi_heads.box_predictor.cls_score.bias"]) - 1, size)
    detector.load_state_dict(tensors)
    return TorchvisionAdapter(detector.eval(), longest_side=size)


def yolox() -> OnnxAdapter:
    """YOLOX-nano, 416 px, the 80 classes of COCO; person is label 0, category 1."""
    return OnnxAdapter(MODELS / "yolox_nano.onnx")
