"""Two small trained detectors of people, as adapters: try the package on photographs within minutes.

    iou-refiner train --detector examples/coco_person.py:faster_rcnn ...

``faster_rcnn`` scores boxes by class alone, the situation IoU-Net was made for; the class scores of ``yolox`` were
trained to hold a little of the IoU already. Weights and photographs lie in a folder ``shared`` beside the checkout, or
where the environment variable IOU_REFINER_SHARED says.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import safetensors.torch

from iou_refiner.adapters.onnx import OnnxAdapter
from iou_refiner.adapters.torchvision import TorchvisionAdapter

_BESIDE = Path(__file__).resolve().parents[2] / "shared"
MODELS = Path(os.environ.get("IOU_REFINER_SHARED", _BESIDE)) / "models"


def faster_rcnn() -> TorchvisionAdapter:
    """torchvision's Faster R-CNN on EfficientNet-Lite0, 320 px, one class: person, label 1."""
    spec = importlib.util.spec_from_file_location("frcnn_lite0", MODELS / "frcnn_lite0.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{MODELS / 'frcnn_lite0.py'} is not a Python module.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    detector = module.build(num_classes=1)
    detector.load_state_dict(safetensors.torch.load_file(MODELS / "frcnn_lite0_person.safetensors"))
    return TorchvisionAdapter(detector.eval(), longest_side=320)


def yolox() -> OnnxAdapter:
    """YOLOX-nano, 416 px, the 80 classes of COCO; person is label 0, category 1."""
    return OnnxAdapter(MODELS / "yolox_nano.onnx")
