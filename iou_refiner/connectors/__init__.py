"""Boxes as others hold them: arrays, dicts of tensors, ``supervision.Detections``, tables, and other people's ids."""

from iou_refiner.connectors.image import to_detections as to_detections
from iou_refiner.connectors.image import to_numpy as to_numpy
from iou_refiner.connectors.image import to_supervision as to_supervision
