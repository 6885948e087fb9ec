"""iou-refiner: better-placed boxes from the detector you already have.

Public names load on first use, so that ``iou-refiner --help`` and ``validate`` never wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from iou_refiner.checks import DataError as DataError
    from iou_refiner.checks import MissingPackageError as MissingPackageError
    from iou_refiner.connectors.image import to_detections as to_detections
    from iou_refiner.connectors.image import to_numpy as to_numpy
    from iou_refiner.connectors.image import to_supervision as to_supervision
    from iou_refiner.detector.adapter import Adapter as Adapter
    from iou_refiner.detector.fingerprint import fingerprint as fingerprint
    from iou_refiner.head.checkpoint import load_head as load_head
    from iou_refiner.head.checkpoint import save_head as save_head
    from iou_refiner.head.config import HeadConfig as HeadConfig
    from iou_refiner.head.iou_head import IoUHead as IoUHead
    from iou_refiner.head.sibling_head import SiblingHead as SiblingHead
    from iou_refiner.pooling.functional import prroi_pool as prroi_pool
    from iou_refiner.pooling.table import FeatureTable as FeatureTable
    from iou_refiner.refiner import IoURefiner as IoURefiner
    from iou_refiner.siblings.config import SiblingConfig as SiblingConfig
    from iou_refiner.stage.ascent import refine_boxes as refine_boxes
    from iou_refiner.stage.ascent import refine_boxes_paper as refine_boxes_paper
    from iou_refiner.stage.nms import iou_guided_nms as iou_guided_nms
    from iou_refiner.stage.settings import StageSettings as StageSettings
    from iou_refiner.stage.soft_nms import soft_nms as soft_nms
    from iou_refiner.stage.stage import Stage as Stage
    from iou_refiner.structures import Detections as Detections
    from iou_refiner.structures import FeatureMaps as FeatureMaps
    from iou_refiner.structures import ImageTransform as ImageTransform
    from iou_refiner.training.from_candidates import train_from_candidates as train_from_candidates
    from iou_refiner.training.jitter import jitter_boxes as jitter_boxes
    from iou_refiner.training.loop import train_head as train_head
    from iou_refiner.training.settings import TrainSettings as TrainSettings
    from iou_refiner.verbs.evaluate import evaluate as evaluate
    from iou_refiner.verbs.report import report as report
    from iou_refiner.verbs.rescore import rescore as rescore
    from iou_refiner.verbs.train import train as train

_HOME = {
    "Adapter": "detector.adapter",
    "DataError": "checks",
    "Detections": "structures",
    "FeatureMaps": "structures",
    "FeatureTable": "pooling.table",
    "HeadConfig": "head.config",
    "ImageTransform": "structures",
    "IoUHead": "head.iou_head",
    "IoURefiner": "refiner",
    "MissingPackageError": "checks",
    "SiblingConfig": "siblings.config",
    "SiblingHead": "head.sibling_head",
    "Stage": "stage.stage",
    "StageSettings": "stage.settings",
    "TrainSettings": "training.settings",
    "evaluate": "verbs.evaluate",
    "fingerprint": "detector.fingerprint",
    "iou_guided_nms": "stage.nms",
    "jitter_boxes": "training.jitter",
    "load_head": "head.checkpoint",
    "prroi_pool": "pooling.functional",
    "refine_boxes": "stage.ascent",
    "refine_boxes_paper": "stage.ascent",
    "report": "verbs.report",
    "rescore": "verbs.rescore",
    "save_head": "head.checkpoint",
    "soft_nms": "stage.soft_nms",
    "to_detections": "connectors.image",
    "to_numpy": "connectors.image",
    "to_supervision": "connectors.image",
    "train": "verbs.train",
    "train_from_candidates": "training.from_candidates",
    "train_head": "training.loop",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"iou_refiner.{_HOME[name]}"), name)
    raise AttributeError(f"module 'iou_refiner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
