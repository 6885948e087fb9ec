"""The adapter of Hugging Face transformers."""

from iou_refiner.adapters.transformers.adapter import ObjectDetector as ObjectDetector
from iou_refiner.adapters.transformers.adapter import TransformersAdapter as TransformersAdapter
