"""COCO json as columns, in and out. Boxes are ``(x, y, width, height)`` in image pixels. Imports no torch."""

from iou_refiner.coco.data import Category as Category
from iou_refiner.coco.data import GroundTruth as GroundTruth
from iou_refiner.coco.data import Image as Image
from iou_refiner.coco.data import Results as Results
from iou_refiner.coco.data import xywh_to_xyxy as xywh_to_xyxy
from iou_refiner.coco.data import xyxy_to_xywh as xyxy_to_xywh
from iou_refiner.coco.ground_truth import read_ground_truth as read_ground_truth
from iou_refiner.coco.ground_truth import read_images as read_images
from iou_refiner.coco.read import read_results as read_results
from iou_refiner.coco.write import write_results as write_results
