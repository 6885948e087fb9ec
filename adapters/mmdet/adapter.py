"""MMDetection's two-stage detectors (Faster, Mask, Cascade R-CNN) and dense ones (RetinaNet, FCOS, ATSS, GFL, YOLOX,
RTMDet and what else is built like them).

mmdet's heads return all their boxes when they are told to leave out NMS, as its test-time augmentation does. A call
runs a shallow twin of the detector, which shares every weight: where the detector would take from its head the boxes
that are left, the twin takes all of them, calls the suppression it was given, and goes on with the detections. Masks
and the way back to the image therefore work on these.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iou_refiner import DataError, Detections, FeatureMaps, ImageTransform
from iou_refiner.adapters.mmdet.library import check_kind, classes, library, load
from iou_refiner.adapters.mmdet.losses import training_twin
from iou_refiner.adapters.twins import shallow
from iou_refiner.detector.adapter import COCO_CATEGORY_IDS, Adapter, AddedLosses, Suppression


class MmdetAdapter(Adapter):
    """A live detector of mmdet 3. Its input is that of its ``test_step``; ``inference_detector`` takes its twin.

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
        self.detector = detector
        if category_ids is None and classes(detector) == library("mmdet.evaluation").get_classes("coco"):
            category_ids = dict(enumerate(COCO_CATEGORY_IDS))
        self.category_ids = None if category_ids is None else dict(category_ids)

    @classmethod
    def from_name(cls, name: str) -> MmdetAdapter:
        """The detector of ``CONFIG.py`` or ``CONFIG.py:WEIGHTS``, a file or URL. Without: the config's ``load_from``.

        The config is Python and is run; the weights are data.

        Raises:
            DataError: no such config or weights, or weights that do not fill the detector.
        """
        stem, colon, weights = name.partition(".py:")
        path = f"{stem}.py" if colon else name
        if not path.endswith(".py"):  # as YAML, mmengine would run the tags in it
            raise DataError(f"An mmdet detector is named by CONFIG.py or CONFIG.py:WEIGHTS, got {name!r}.")
        try:
            config = library("mmengine.config").Config.fromfile(path)
        except (OSError, SyntaxError) as error:
            raise DataError(f"The config of an mmdet detector, {path!r}, cannot be read ({error}).") from None
        weights = weights or config.get("load_from")
        if not weights:
            raise DataError(f"{path} names no weights (`load_from`). Name them: mmdet:{path}:WEIGHTS.")
        return cls(load(config, weights))

    def settings(self) -> str:
        """How images are prepared, and which boxes are proposals and candidates."""
        modules = self.detector.named_modules()
        limits = {name: module.test_cfg for name, module in modules if getattr(module, "test_cfg", None)}
        return f"{self._pipeline_config} {self.detector.cfg.model.get('data_preprocessor')} {limits}"

    def prepare(self, rgb: np.ndarray) -> tuple[dict[str, Any], ImageTransform]:
        """An RGB image (H, W, 3) uint8 through the config's test pipeline: ``inputs`` (3, h, w) and ``data_samples``.

        The transform is that of the image itself: the pipeline notes how it scaled the image, and mmdet gives results
        in the image's own pixels. The scale between the two is in :meth:`transforms`.
        """
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])  # as mmdet's own reader would give it
        return self._pipeline({"img": bgr, "img_id": 0}), ImageTransform((rgb.shape[0], rgb.shape[1]))

    @property
    def _pipeline_config(self) -> Any:
        config = copy.deepcopy(library("mmdet.utils").get_test_pipeline_cfg(self.detector.cfg))
        config[0].type = "mmdet.LoadImageFromNDArray"
        return config

    @cached_property
    def _pipeline(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        pipeline: Callable[[dict[str, Any]], dict[str, Any]] = library("mmcv.transforms").Compose(self._pipeline_config)
        return pipeline

    def twin(self, suppression: Suppression) -> Any:
        """A detector of the same class that shares every weight, with ``suppression`` in place of its own.

        ``test_step`` and ``inference_detector`` work with it as with the detector; ``pred_instances`` have ``ious``
        where the suppression gives them.
        """
        twin = shallow(self.detector)
        if hasattr(twin, "roi_head"):
            twin._modules["roi_head"] = _roi_head_twin(twin.roi_head, suppression)
        else:
            twin._modules["bbox_head"] = _dense_head_twin(twin.bbox_head, suppression)
        return twin

    def run(self, suppression: Suppression, data: Any) -> list[Any]:
        """The detector's ``test_step`` with its suppression replaced: ``DetDataSample``, with ``ious``.

        Args:
            suppression: features and candidates in, detections out; network pixels.
            data: a batch as ``test_step`` takes it, or a list of what :meth:`prepare` gives.
        """
        with torch.no_grad():
            results: list[Any] = self.twin(suppression).test_step(_collated(data))
        return results

    def detect(self, data: Any) -> list[Any]:
        """The detector's own ``test_step``, untouched; ``data`` as in :meth:`run`."""
        with torch.no_grad():
            results: list[Any] = self.detector.test_step(_collated(data))
        return results

    def losses(self, added: AddedLosses, data: Any) -> dict[str, Any]:
        """The losses of the detector's ``train_step``, and those of ``added``: what its ``parse_losses`` takes.

        ``data`` is a batch as ``train_step`` takes it.
        """
        twin = training_twin(self.detector, added)
        losses: dict[str, Any] = twin(**twin.data_preprocessor(_collated(data), True), mode="loss")
        return losses

    def transforms(self, images: Any, features: FeatureMaps) -> list[ImageTransform]:
        """From the image file, in whose pixels results are given, to the network input."""
        return [_transform(sample.metainfo) for sample in _collated(images)["data_samples"]]


def _collated(data: Any) -> Any:
    """A batch as ``test_step`` takes it; a list of single items becomes one, as in mmdet's own data loaders."""
    return library("mmengine.dataset").pseudo_collate(data) if isinstance(data, (list, tuple)) else data


def _roi_head_twin(head: Any, suppression: Suppression) -> Any:
    """A RoI head with ``suppression`` in place of its own; its mask head goes on with the detections."""
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
        candidates = head.predict_bbox(x, batch_img_metas, rpn_results_list, rcnn_test_cfg=unsuppressed, rescale=False)
        return _suppress(suppression, x, extractor.featmap_strides, candidates, batch_img_metas, rescale)

    twin.predict_bbox = predict_bbox
    return twin


def _dense_head_twin(head: Any, suppression: Suppression) -> Any:
    """A dense head with ``suppression`` in place of its own."""
    twin = shallow(head)
    strides = [stride for stride, _ in head.prior_generator.strides]

    def predict(x: Sequence[Tensor], batch_data_samples: list[Any], rescale: bool = False) -> list[Any]:
        metas = [sample.metainfo for sample in batch_data_samples]
        candidates = head.predict_by_feat(*head(x), batch_img_metas=metas, rescale=False, with_nms=False)
        return _suppress(suppression, x, strides, candidates, metas, rescale)

    twin.predict = predict
    return twin


def _suppress(
    suppression: Suppression,
    x: Sequence[Tensor],
    strides: Sequence[float],
    candidates: list[Any],
    metas: list[Any],
    rescale: bool,
) -> list[Any]:
    """``suppression`` for mmdet's ``InstanceData``: maps and candidates in, detections out."""
    levels = sorted(zip(strides, x, strict=False), key=lambda level: level[0])  # some necks start with the coarsest
    transforms = [_transform(meta) for meta in metas]
    features = FeatureMaps(
        tuple(level for _, level in levels),
        tuple(stride for stride, _ in levels),
        tuple(map(_network_size, transforms)),
    )
    rows = [Detections(image.bboxes, image.scores, image.labels) for image in candidates]
    structures, boxes = library("mmengine.structures"), library("mmdet.structures.bbox")
    results = []
    for image, transform in zip(suppression(features, rows), transforms, strict=True):
        # A mask head scales boxes in place on the way back to the image: not those the suppression may still hold.
        back = [1 / scale for scale in transform.scale]
        scaled = boxes.scale_boxes(image.boxes, back) if rescale else image.boxes.clone()
        instances = structures.InstanceData(bboxes=scaled, scores=image.scores, labels=image.labels)
        if image.ious is not None:
            instances.ious = image.ious
        results.append(instances)
    return results


def _transform(meta: Mapping[str, Any]) -> ImageTransform:
    """From the image to the network input. What mmdet calls ``img_shape`` may hold padding, on the right and below."""
    height, width = meta["ori_shape"][:2]
    x, y = meta["scale_factor"]
    return ImageTransform((height, width), (float(x), float(y)))


def _network_size(transform: ImageTransform) -> tuple[int, int]:
    """``(height, width)`` of the image inside the network input."""
    (height, width), (x, y) = transform.image_size, transform.scale
    return round(height * y), round(width * x)
