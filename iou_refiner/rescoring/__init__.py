"""Whole data sets: candidates of a detector to COCO results, and COCO results to better ones.

All goes image by image and yields the results of one at a time, so memory does not grow with the number of images.
Where features come from is the caller's choice: the live detector, a cache, or nowhere.
"""

from iou_refiner.rescoring.dump import DumpSummary as DumpSummary
from iou_refiner.rescoring.dump import dump_candidates as dump_candidates
from iou_refiner.rescoring.records import category_map as category_map
from iou_refiner.rescoring.records import to_results as to_results
from iou_refiner.rescoring.rescore import rescore as rescore
from iou_refiner.rescoring.saved import check_saved as check_saved
from iou_refiner.rescoring.saved import rescore_saved as rescore_saved
from iou_refiner.rescoring.saved import saved_candidates as saved_candidates
from iou_refiner.rescoring.saved import saved_likeness as saved_likeness
from iou_refiner.rescoring.saved import stage_without_detector as stage_without_detector
