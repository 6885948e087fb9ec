"""The adapter of Detectron2."""

from iou_refiner.adapters.detectron2.adapter import Detectron2Adapter as Detectron2Adapter
