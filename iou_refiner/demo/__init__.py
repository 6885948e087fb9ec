"""The demo: a detector and its head trained on made images, and what the head changes."""

from iou_refiner.demo.run import detector as detector
from iou_refiner.demo.run import run_demo as run_demo
