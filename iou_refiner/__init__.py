"""iou-refiner: better-placed boxes from the detector you already have.

Public names load on first use, so that ``iou-refiner --help`` and ``validate`` never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from iou_refiner._version import __version__ as __version__

if TYPE_CHECKING:
    from iou_refiner._checks import DataError as DataError
    from iou_refiner._checks import MissingPackageError as MissingPackageError
    from iou_refiner.data import Detections as Detections
    from iou_refiner.data import FeatureMaps as FeatureMaps
    from iou_refiner.data import Frame as Frame
    from iou_refiner.evaluation import evaluate as evaluate
    from iou_refiner.extraction import Adapter as Adapter
    from iou_refiner.jitter import jitter_boxes as jitter_boxes
    from iou_refiner.nms import iou_guided_nms as iou_guided_nms
    from iou_refiner.nms import soft_nms as soft_nms
    from iou_refiner.pooling import FeaturePyramid as FeaturePyramid
    from iou_refiner.pooling import prroi_pool as prroi_pool
    from iou_refiner.predictor import IoUPredictor as IoUPredictor
    from iou_refiner.predictor import fingerprint as fingerprint
    from iou_refiner.refine import refine_boxes as refine_boxes
    from iou_refiner.refine import refine_boxes_paper as refine_boxes_paper
    from iou_refiner.refiner import IoURefiner as IoURefiner
    from iou_refiner.stage import Stage as Stage
    from iou_refiner.training import fit as fit

_HOME = {
    "Adapter": "extraction",
    "DataError": "_checks",
    "Detections": "data",
    "FeatureMaps": "data",
    "FeaturePyramid": "pooling",
    "Frame": "data",
    "IoUPredictor": "predictor",
    "IoURefiner": "refiner",
    "MissingPackageError": "_checks",
    "Stage": "stage",
    "evaluate": "evaluation",
    "fingerprint": "predictor",
    "fit": "training",
    "iou_guided_nms": "nms",
    "jitter_boxes": "jitter",
    "prroi_pool": "pooling",
    "refine_boxes": "refine",
    "refine_boxes_paper": "refine",
    "soft_nms": "nms",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"iou_refiner.{_HOME[name]}"), name)
    raise AttributeError(f"module 'iou_refiner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
