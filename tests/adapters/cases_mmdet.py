"""mmdet's detectors as cases of the contract: the configs it comes with, made small, with seeded random weights.

mmdet's Python runs as it is. Only backbones are replaced, by one whose cells lie exactly where their stride says, and,
where mmcv has no compiled kernels, the two that these detectors call.
"""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps, IoURefiner
from iou_refiner.adapters.mmdet import MmdetAdapter
from tests.adapters import mmcv_ext_stand_in
from tests.adapters.case import Case, noise
from tests.kit.needs import needs_package

#: What mmdet 3.3.0 does that its dependencies have deprecated since, as pytest's filters.
WARNINGS = (
    "ignore:`torch.cuda.amp.autocast:FutureWarning:mmdet",  # the layers of RTMDet
    "ignore:torch.meshgrid:UserWarning:torch",  # the grids of points
    "ignore:.*`num_anchors` is deprecated:UserWarning:mmdet",  # an alias of ATSS and GFL
    "ignore:To copy construct from a tensor:UserWarning:mmdet",  # the mask head of a cascade
)

SIZES = [(70, 110), (90, 64), (200, 150)]
#: YOLOX and RTMDet pad to a square and leave boxes in the padding as they are; square images have none.
SQUARES = [(70, 70), (90, 90), (200, 200)]

BOX_HEAD = {"in_channels": 16, "fc_out_channels": 32, "num_classes": 3}
MASK_HEAD = {"num_convs": 1, "in_channels": 16, "conv_out_channels": 8, "num_classes": 3}
MASKS = {"mask_roi_extractor": {"out_channels": 16}, "mask_head": MASK_HEAD}
DENSE = {"in_channels": 16, "feat_channels": 16, "stacked_convs": 1, "num_classes": 3}
ANCHORS = DENSE | {"anchor_generator": {"strides": [8, 16, 32]}}  # coarser: a single cell in these small images
GROUPS = {"norm_cfg": {"type": "GN", "num_groups": 4}}
PAFPN = {"in_channels": [16, 32, 64], "out_channels": 16, "num_csp_blocks": 1}


def two_stage(config: str, **roi_head: Any) -> dict[str, Any]:
    """A backbone with FPN, RPN and the parts of ``roi_head``, of few channels and proposals."""
    model = {
        "backbone": {"type": "Patches", "levels": [0, 1, 2, 3], "_delete_": True},
        "neck": {"in_channels": [8, 16, 32, 64], "out_channels": 16},
        "rpn_head": {"in_channels": 16, "feat_channels": 16},
        "roi_head": {"bbox_roi_extractor": {"out_channels": 16}, "bbox_head": BOX_HEAD} | roi_head,
        "test_cfg": {"rpn": {"max_per_img": 60}, "rcnn": {"score_thr": 0.22}},
    }
    return {"config": config, "model": model}


def dense(
    config: str, bbox_head: dict[str, Any], neck: dict[str, Any] | None = None, **test_cfg: Any
) -> dict[str, Any]:
    """A backbone with a neck of strides 8, 16, 32 and a dense head, of few channels."""
    model = {
        "backbone": {"type": "Patches", "levels": [0, 1, 2, 3] if neck is None else [1, 2, 3], "_delete_": True},
        "neck": neck or {"in_channels": [8, 16, 32, 64], "out_channels": 16, "num_outs": 3},
        "bbox_head": bbox_head,
        "test_cfg": {"nms_pre": 60} | test_cfg,
    }
    return {"config": config, "model": model}


#: What each case changes in a config of mmdet. Scores are cut so that some hundred candidates remain.
SMALL: dict[str, dict[str, Any]] = {
    "faster_rcnn": two_stage("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
    "mask_rcnn": two_stage("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", **MASKS),
    "cascade_mask_rcnn": two_stage(
        "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
        **{"bbox_head": {str(stage): BOX_HEAD for stage in range(3)}, **MASKS},
    ),
    "retinanet": dense("retinanet/retinanet_r50_fpn_1x_coco.py", ANCHORS, score_thr=0.6),
    "fcos": dense(
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        DENSE | GROUPS | {"strides": [8, 16, 32], "regress_ranges": ((-1, 64), (64, 128), (128, 1e8))},
        score_thr=0.6,
    ),
    "atss": dense("atss/atss_r50_fpn_1x_coco.py", ANCHORS | GROUPS, score_thr=0.6),
    "gfl": dense("gfl/gfl_r50_fpn_1x_coco.py", ANCHORS | GROUPS, score_thr=0.7),
    "yolov3": dense(
        "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py",
        {"in_channels": [16, 16, 16], "out_channels": [16, 16, 16], "num_classes": 3},
        {"in_channels": [64, 32, 16], "out_channels": [16, 16, 16]},
    ),
    "yolox": dense(
        "yolox/yolox_tiny_8xb8-300e_coco.py", DENSE, PAFPN, score_thr=0.7, nms={"type": "nms", "iou_threshold": 0.1}
    ),
    "rtmdet": dense(
        "rtmdet/rtmdet_tiny_8xb32-300e_coco.py", DENSE, PAFPN, score_thr=0.6, nms={"type": "nms", "iou_threshold": 0.3}
    ),
}

#: The last layers of the heads: their names, how far their weights are drawn apart, and their bias.
OUTPUTS = {
    r"(fc|rpn|conv|atss|gfl)_(cls|obj)(\.\d)*$|convs_pred\.\d$": (0.3, 0.0),
    r"retina_cls$": (0.02, 0.0),
    r"rtm_cls\.\d$": (3.0, 0.0),
    r"(fc|rpn|retina|atss|gfl)_reg$": (0.05, 0.0),
    r"(bbox_head\.conv|rtm)_reg(\.\d)*$": (0.05, 1.5),  # distances to the sides: boxes larger than a cell
    r"multi_level_conv_reg\.\d$": (0.005, (0.5, 0.5, -0.5, -0.5)),  # YOLOX clips nothing: boxes within their cell
}


def import_mmdet() -> Any:
    """mmdet with all its detectors; a skip where there is no mmdet."""
    needs_package("mmcv")
    mmcv_ext_stand_in.install()
    with warnings.catch_warnings():
        # mmdet imports a layer from where mmcv used to have it, and Detectron2 where that is installed.
        warnings.filterwarnings("ignore", "``MultiScaleDeformableAttention`` has been moved", ImportWarning)
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        needs_package("mmdet.models")
    mmdet, registry = importlib.import_module("mmdet"), importlib.import_module("mmdet.registry")
    registry.MODELS.register_module(module=Patches, force=True)
    return mmdet


class Patches(nn.Module):
    """A backbone whose cells read patches side by side; ``levels`` 0 to 3 have strides 4 to 32 and 8 to 64 channels."""

    def __init__(self, levels: list[int]):
        super().__init__()
        self.levels = levels
        channels, sides = (3, 8, 16, 32, 64), (4, 2, 2, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels[i], channels[i + 1], side, side), nn.BatchNorm2d(channels[i + 1]), nn.ReLU()
            )
            for i, side in enumerate(sides)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[level + 1] for level in self.levels)


def small_config(name: str) -> Any:
    """A config of mmdet with few channels, for images of at most 160 pixels."""
    small, configs = SMALL[name], Path(import_mmdet().__file__).parent / ".mim" / "configs"
    from mmengine.config import Config

    config = Config.fromfile(configs / small["config"])
    config.merge_from_dict({"model": copy.deepcopy(small["model"])})  # merging takes `_delete_` out of it
    for step in config.test_dataloader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = (160, 160) if name in ("yolov3", "yolox", "rtmdet") else (160, 96)
        elif step.type == "Pad" and "size" in step:
            step.size = (160, 160)
    return config


def small_detector(name: str) -> Any:
    """A detector with random weights, uneven enough to detect something in noise."""
    config = small_config(name)
    from mmdet.registry import MODELS
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        detector = revert_sync_batchnorm(MODELS.build(config.model))
        for name, layer in detector.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
            elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)
            for output, (spread, bias) in OUTPUTS.items():
                if re.search(output, name) and hasattr(layer, "weight"):
                    nn.init.normal_(layer.weight, std=spread)
                    layer.bias.data[:] = torch.tensor(bias)
        with torch.no_grad():  # the statistics of noise keep random features at about 1
            maps = detector.train().extract_feat(torch.randn(4, 3, 128, 128) * 60)
            if hasattr(detector, "bbox_head"):
                detector.bbox_head(maps)
    detector.cfg = config
    return detector.eval()


class MmdetCase(Case):
    """mmdet is called by ``test_step`` with a collated batch, and returns one ``DetDataSample`` per image."""

    package, replaced = "mmdet", "roi_head.predict_bbox or bbox_head.predict, called without NMS"

    def __init__(self, name: str, sizes: list[tuple[int, int]] = SIZES):
        super().__init__(MmdetAdapter(small_detector(name)), noise(*sizes))
        # YOLOX divides boxes by the scale, where all others multiply by its inverse: a float32 apart.
        self.tolerance = 1e-4 if name == "yolox" else 0.0

    def call(self, detector: Any, images: Any) -> Any:
        from mmengine.dataset import pseudo_collate

        data = pseudo_collate(images)
        with torch.no_grad():
            return detector(data) if isinstance(detector, IoURefiner) else detector.test_step(data)

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        from mmcv.ops import batched_nms

        detector, detections = self.adapter.detector, []
        limits = detector.test_cfg.rcnn if hasattr(detector, "roi_head") else detector.test_cfg
        for image in candidates:
            if len(image):
                _, rows = batched_nms(image.boxes, image.scores, image.labels, limits.nms)
                image = image[rows]
            detections.append(image[: limits.get("max_per_img")])
        return detections

    def as_dicts(self, results: Any) -> list[dict[str, Tensor]]:
        instances = [dict(result.pred_instances.items()) for result in results]
        return [{"boxes": image.pop("bboxes"), **image} for image in instances]

    def silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        detector = self.adapter.detector
        head = detector.roi_head if hasattr(detector, "roi_head") else detector.bbox_head
        monkeypatch.setitem(head.test_cfg, "score_thr", 1.0)


CASES: dict[str, Callable[[], Case]] = {
    "faster_rcnn": lambda: MmdetCase("faster_rcnn"),
    "mask_rcnn": lambda: MmdetCase("mask_rcnn"),
    "cascade_mask_rcnn": lambda: MmdetCase("cascade_mask_rcnn"),
    "retinanet": lambda: MmdetCase("retinanet"),
    "atss": lambda: MmdetCase("atss"),
    "gfl": lambda: MmdetCase("gfl"),
    "yolox": lambda: MmdetCase("yolox", SQUARES),
    "rtmdet": lambda: MmdetCase("rtmdet", SQUARES),
}
