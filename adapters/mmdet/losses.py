"""Training of mmdet's two-stage detectors together with a head: their own ``mode="loss"``, with losses added.

The detector computes its losses first, untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from iou_refiner import FeatureMaps
from iou_refiner.adapters.twins import shallow
from iou_refiner.detector.adapter import AddedLosses, TrainingImage


def training_twin(detector: Any, added: AddedLosses) -> Any:
    """A detector of the same class that shares every weight; its ``loss`` has the losses of ``added`` too.

    Raises:
        TypeError: the detector has no RoI head.
    """
    if not hasattr(detector, "roi_head"):
        raise TypeError(
            f"{type(detector).__name__} cannot be trained together with a head: of mmdet's detectors the two-stage "
            "ones can. To train it alone, put the head in inference mode: refiner.head.eval()."
        )
    head = detector.roi_head
    extractor: Any = head.bbox_roi_extractor
    if isinstance(extractor, nn.ModuleList):  # one for each stage of a cascade
        extractor = extractor[-1]

    def loss(x: Sequence[Tensor], rpn_results_list: list[Any], batch_data_samples: list[Any]) -> dict[str, Any]:
        proposed = [proposals.bboxes for proposals in rpn_results_list]  # mmdet renames them
        losses = head.loss(x, rpn_results_list, batch_data_samples)
        # What mmdet calls `img_shape` may hold padding: boxes are clipped to it by mmdet too.
        sizes = tuple(tuple(sample.metainfo["img_shape"][:2]) for sample in batch_data_samples)
        strides = tuple(extractor.featmap_strides)
        maps = FeatureMaps(tuple(x[: len(strides)]), strides, sizes)
        images = [_image(*each) for each in zip(proposed, batch_data_samples, strict=True)]
        return {**added(maps, images), **losses}

    twin = shallow(detector)
    twin._modules["roi_head"] = shallow(head)
    twin.roi_head.loss = loss
    return twin


def _image(proposals: Tensor, sample: Any) -> TrainingImage:
    gt, ignored = sample.gt_instances, sample.get("ignored_instances")
    others = None if ignored is None else (_tensor(ignored.bboxes), ignored.labels)
    return TrainingImage.of(_tensor(proposals), (_tensor(gt.bboxes), gt.labels), others)


def _tensor(boxes: Any) -> Tensor:
    """mmdet has boxes as tensors, or as objects that hold one."""
    tensor: Tensor = getattr(boxes, "tensor", boxes)
    return tensor
