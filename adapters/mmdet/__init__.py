"""The adapter of MMDetection."""

from iou_refiner.adapters.mmdet.adapter import MmdetAdapter as MmdetAdapter
