"""MMDetection's two-stage detectors (Faster, Mask, Cascade R-CNN) and dense ones (RetinaNet, FCOS, ATSS, GFL, YOLOX,
RTMDet and what else is built like them).

mmdet's heads answer with all their boxes when they are asked to leave out NMS, as its test-time augmentation does. A
call runs a shallow twin of the detector, which shares every weight: where the detector would ask its head for the boxes
that are left, the twin asks for all of them, lets the stage choose, and goes on. Masks and the way back to the image
therefore work on the stage's boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import DataError, Detections, FeatureMaps, Frame, fingerprint
from iou_refiner.adapters.mmdet.library import check_kind, classes, library, load
from iou_refiner.adapters.twins import seen_by_stage, shallow
from iou_refiner.coco.data import COCO_IDS
from iou_refiner.detector.adapter import Suppression


class MmdetAdapter:
    """A live detector of mmdet 3. Its input is that of its ``test_step``; inside ``inference_detector`` goes its twin.

    Args:
        detector: a two-stage or dense detector with its config as ``.cfg``, as ``init_detector`` makes it.
        category_ids: dataset category id of each label. Default: COCO's for a detector of its 80 classes, else labels
            are ids.

    Raises:
        TypeError: the detector is of another kind (a transformer, panoptic, proposals alone), or has no config.
        MissingPackageError: mmdet or its mmcv is missing or does not fit.
    """

    def __init__(self, detector: nn.Module, *, category_ids: Mapping[int, int] | None = None):
        check_kind(detector)
        self.detector: Any = detector
        if category_ids is None and classes(detector) == library("mmdet.evaluation").get_classes("coco"):
            category_ids = dict(enumerate(COCO_IDS))
        self.category_ids: dict[int, int] | None = None if category_ids is None else dict(category_ids)

    @classmethod
    def from_name(cls, name: str) -> MmdetAdapter:
        """The detector of ``CONFIG.py`` or ``CONFIG.py:WEIGHTS``, a file or URL. Without: the config's ``load_from``.

        Raises:
            DataError: no such config or weights, or weights that do not fill the detector.
        """
        stem, colon, weights = name.partition(".py:")
        path = f"{stem}.py" if colon else name
        try:
            config = library("mmengine.config").Config.fromfile(path)
        except OSError as error:
            raise DataError(f"The config of an mmdet detector, {path!r}, cannot be read ({error}).") from None
        weights = weights or config.get("load_from")
        if not weights:
            raise DataError(f"{path} names no weights (`load_from`). Name them: mmdet:{path}:WEIGHTS.")
        return cls(load(config, weights))

    @property
    def device(self) -> torch.device:
        """Where the detector's weights are."""
        device: torch.device = next(self.detector.parameters()).device
        return device

    def to(self, device: torch.device | str) -> MmdetAdapter:
        """Move the detector."""
        self.detector.to(device)
        return self

    def fingerprint(self) -> str:
        """Hash of all weights and buffers of the detector."""
        return fingerprint(self.detector)

    def settings(self) -> str:
        """How images are prepared, and which boxes are proposals and candidates."""
        modules = self.detector.named_modules()
        limits = {name: module.test_cfg for name, module in modules if getattr(module, "test_cfg", None)}
        return f"{self._pipeline_config} {self.detector.cfg.model.get('data_preprocessor')} {limits}"

    def prepare(self, rgb: np.ndarray) -> tuple[dict[str, Any], Frame]:
        """An RGB image (H, W, 3) uint8 through the config's test pipeline: ``inputs`` (3, h, w) and ``data_samples``.

        The frame is that of the image itself: the pipeline notes how it scaled the image, and mmdet answers in the
        image's own pixels. The scale between the two is in the frame of :meth:`extract`.
        """
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])  # as mmdet's own reader would give it
        return self._pipeline({"img": bgr, "img_id": 0}), Frame((rgb.shape[0], rgb.shape[1]))

    @property
    def _pipeline_config(self) -> Any:
        config = copy.deepcopy(library("mmdet.utils").get_test_pipeline_cfg(self.detector.cfg))
        config[0].type = "mmdet.LoadImageFromNDArray"
        return config

    @cached_property
    def _pipeline(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        pipeline: Callable[[dict[str, Any]], dict[str, Any]] = library("mmcv.transforms").Compose(self._pipeline_config)
        return pipeline

    def twin(self, stage: Suppression) -> Any:
        """A detector of the same class that shares all weights and whose suppression is ``stage``.

        ``inference_detector`` and ``test_step`` take it as they take the detector; ``pred_instances`` get ``ious``.
        """
        twin = shallow(self.detector)
        if hasattr(twin, "roi_head"):
            twin._modules["roi_head"] = _roi_head_twin(twin.roi_head, stage)
        else:
            twin._modules["bbox_head"] = _dense_head_twin(twin.bbox_head, stage)
        return twin

    def run(self, stage: Suppression, data: Any) -> list[Any]:
        """The detector's ``test_step`` with its suppression replaced by ``stage``: ``DetDataSample``, with ``ious``.

        Args:
            stage: what chooses.
            data: a batch as ``test_step`` takes it, or a list of what :meth:`prepare` gives.
        """
        with torch.no_grad():
            results: list[Any] = self.twin(stage).test_step(_collated(data))
        return results

    def answer(self, data: Any) -> list[Any]:
        """The detector's own ``test_step``, untouched; ``data`` as in :meth:`run`."""
        with torch.no_grad():
            results: list[Any] = self.detector.test_step(_collated(data))
        return results

    def extract(self, images: Any) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """Feature maps, candidates before suppression (network frame), and the frame of each image.

        Frames are from the image file, in whose pixels results are given, to the network input.
        """
        data = _collated(images)
        features, candidates = seen_by_stage(self.run, data)
        return features, candidates, [_frame(sample.metainfo) for sample in data["data_samples"]]


def _collated(data: Any) -> Any:
    """A batch as ``test_step`` takes it; a list of single items becomes one, as in mmdet's own data loaders."""
    return library("mmengine.dataset").pseudo_collate(data) if isinstance(data, (list, tuple)) else data


# --- the twin --------------------------------------------------------------------------------------------------------


def _roi_head_twin(head: Any, stage: Suppression) -> Any:
    """A RoI head whose boxes are those that ``stage`` chooses; its mask head goes on with them."""
    twin = shallow(head)
    extractor: Any = head.bbox_roi_extractor
    if isinstance(extractor, nn.ModuleList):  # one for each stage of a cascade
        extractor = extractor[-1]

    def predict_bbox(
        x: Sequence[Tensor],
        batch_img_metas: list[Any],
        rpn_results_list: list[Any],
        rcnn_test_cfg: Any,
        rescale: bool = False,
    ) -> list[Any]:
        # Without `nms` mmdet sorts the boxes above the score threshold and keeps all of them.
        unsuppressed = type(rcnn_test_cfg)(rcnn_test_cfg, nms=None, max_per_img=-1)
        found = head.predict_bbox(x, batch_img_metas, rpn_results_list, rcnn_test_cfg=unsuppressed, rescale=False)
        return _choose(stage, x, extractor.featmap_strides, found, batch_img_metas, rescale)

    twin.predict_bbox = predict_bbox
    return twin


def _dense_head_twin(head: Any, stage: Suppression) -> Any:
    """A dense head whose boxes are those that ``stage`` chooses."""
    twin = shallow(head)
    strides = [stride for stride, _ in head.prior_generator.strides]

    def predict(x: Sequence[Tensor], batch_data_samples: list[Any], rescale: bool = False) -> list[Any]:
        metas = [sample.metainfo for sample in batch_data_samples]
        found = head.predict_by_feat(*head(x), batch_img_metas=metas, rescale=False, with_nms=False)
        return _choose(stage, x, strides, found, metas, rescale)

    twin.predict = predict
    return twin


def _choose(
    stage: Suppression, x: Sequence[Tensor], strides: Sequence[float], found: list[Any], metas: list[Any], rescale: bool
) -> list[Any]:
    """``stage`` on mmdet's ``InstanceData``: maps and all boxes found in, instances to go on with out."""
    levels = sorted(zip(strides, x, strict=False), key=lambda level: level[0])  # some necks start with the coarsest
    frames = [_frame(meta) for meta in metas]
    features = FeatureMaps(
        tuple(level for _, level in levels), tuple(stride for stride, _ in levels), tuple(map(_network_size, frames))
    )
    candidates = [Detections(one.bboxes, one.scores, one.labels) for one in found]
    structures, boxes = library("mmengine.structures"), library("mmdet.structures.bbox")
    chosen = []
    for kept, frame in zip(stage(features, candidates), frames, strict=True):
        # A mask head scales boxes in place on the way back to the image: not those the stage may still hold.
        back = [1 / scale for scale in frame.scale]
        scaled = boxes.scale_boxes(kept.boxes, back) if rescale else kept.boxes.clone()
        instances = structures.InstanceData(bboxes=scaled, scores=kept.scores, labels=kept.labels)
        if kept.ious is not None:
            instances.ious = kept.ious
        chosen.append(instances)
    return chosen


def _frame(meta: Mapping[str, Any]) -> Frame:
    """From the image to the network input. What mmdet calls ``img_shape`` may hold padding, on the right and below."""
    height, width = meta["ori_shape"][:2]
    x, y = meta["scale_factor"]
    return Frame((height, width), (float(x), float(y)))


def _network_size(frame: Frame) -> tuple[int, int]:
    """``(height, width)`` of the image inside the network input."""
    (height, width), (x, y) = frame.image_size, frame.scale
    return round(height * y), round(width * x)
