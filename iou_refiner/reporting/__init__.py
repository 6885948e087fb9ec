"""One page on before and after: the gain and whether to trust it, AP, errors, calibration, the images that changed."""

from iou_refiner.reporting.making import Report as Report
from iou_refiner.reporting.making import make_report as make_report
