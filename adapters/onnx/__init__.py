"""The adapter of exported detectors."""

from iou_refiner.adapters.onnx.adapter import OnnxAdapter as OnnxAdapter
from iou_refiner.adapters.onnx.layouts import LAYOUTS as LAYOUTS
from iou_refiner.adapters.onnx.layouts import OnnxLayout as OnnxLayout
