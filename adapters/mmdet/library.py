"""What the mmdet adapter needs of mmdet itself: its modules, which detectors it knows, and their weights."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from iou_refiner import DataError, MissingPackageError
from iou_refiner.adapters.weights import tensors_only

TESTED = "mmdet==3.3.0 mmengine==0.10.7 mmcv==2.1.0"


def library(module: str) -> Any:
    """A module of mmdet, mmcv or mmengine, or one sentence on how to come by versions that fit together."""
    try:
        _ = importlib.import_module("mmdet.structures")  # where a mmcv without kernels shows
        return importlib.import_module(module)
    except (ImportError, AssertionError) as error:  # the latter where mmdet finds another mmcv than it wants
        raise MissingPackageError(
            f"An mmdet detector needs mmdet 3 with the compiled mmcv it was made for, which do not import ({error}). "
            f"pip install {TESTED}  (tested)"
        ) from error


def check_kind(detector: Any) -> None:
    """Raise TypeError unless what the twin replaces is mmdet's own, and the config is there."""
    detectors, name = library("mmdet.models.detectors"), type(detector).__name__
    two_stage, dense = detectors.TwoStageDetector, detectors.SingleStageDetector
    known = False
    if isinstance(detector, two_stage):
        heads, kind = library("mmdet.models.roi_heads"), type(detector.roi_head)
        own = [head.predict_bbox for head in (heads.StandardRoIHead, heads.CascadeRoIHead)]
        known = type(detector).predict is two_stage.predict and kind.predict is heads.BaseRoIHead.predict
        known = known and kind.predict_bbox in own
        name += f" with {kind.__name__}"
    elif isinstance(detector, dense):
        heads, kind = library("mmdet.models.dense_heads"), type(detector.bbox_head)
        standard = library("mmdet.models.dense_heads.base_dense_head").BaseDenseHead.predict
        known = type(detector).predict is dense.predict and kind.predict is standard
        known = known and hasattr(detector.bbox_head, "prior_generator")
        known = known and "with_nms" in inspect.signature(kind.predict_by_feat).parameters
        # These have the argument, and refuse to do without NMS.
        known = known and not issubclass(kind, (heads.PAAHead, heads.RPNHead, heads.RTMDetInsHead))
        name += f" with {kind.__name__}"
    if not known:
        raise TypeError(
            "The mmdet adapter takes two-stage detectors with StandardRoIHead or CascadeRoIHead and dense ones whose "
            f"head can leave out NMS (RetinaNet, FCOS, ATSS, GFL, YOLOX, RTMDet, ...), got {name}."
        )
    if not hasattr(detector, "cfg"):
        raise TypeError(
            f"The mmdet detector, a {name}, has no config as `.cfg`, which says how its images are prepared. Build it "
            "with mmdet.apis.init_detector, or set `detector.cfg = mmengine.Config.fromfile(...)`."
        )


def classes(detector: Any) -> list[str]:
    """Names of the detector's classes in the order of its labels, empty where it has none."""
    return list((getattr(detector, "dataset_meta", None) or {}).get("classes") or ())


def load(config: Any, weights: str) -> Any:
    """The detector of a config, filled from a checkpoint.

    Raises:
        DataError: the checkpoint cannot be read, holds more than tensors, or leaves some of the detector unfilled,
            which mmdet would only log.
    """
    try:
        with tensors_only(weights):
            checkpoint = library("mmengine.runner").CheckpointLoader.load_checkpoint(weights, map_location="cpu")
            detector = library("mmdet.apis").init_detector(config, weights, device="cpu")
    except (OSError, RuntimeError) as error:
        raise DataError(f"The weights {weights!r} cannot be read ({error}).") from None
    loaded = checkpoint.get("state_dict", checkpoint)
    tensors = {name: tensor for name, tensor in detector.state_dict().items() if tensor.is_floating_point()}
    unfilled = [n for n, tensor in tensors.items() if n not in loaded or loaded[n].shape != tensor.shape]
    if unfilled:
        raise DataError(
            f"The weights {weights!r} leave {len(unfilled)} of {len(tensors)} tensors of the detector unfilled "
            f"({unfilled[0]}, ...). Name the weights trained with this config: mmdet:CONFIG.py:WEIGHTS."
        )
    return detector
