"""Detectron2's detectors as cases of the contract: its own code, built small, with seeded random weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps
from iou_refiner.adapters.detectron2 import Detectron2Adapter
from tests.adapters.case import Case, noise
from tests.kit.needs import needs_package

CLASSES = 3
SIZES = {"min_size": 96, "max_size": 160}
R_CNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [96], [128]],
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 60,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.25,  # cuts among the random scores, and before the limit of 100 does
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [8],
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
}
MASK = {"MODEL.MASK_ON": True}
CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
C4 = {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.FPN.IN_FEATURES": [],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
}
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 20, 25], [32, 40, 51], [64, 80, 101], [90, 100, 110], [128, 140, 150]],
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.6,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 60,
}
#: The last layers of the heads: how far their weights are drawn apart, and their bias.
OUTPUTS = {
    "objectness_logits": (0.3, 0.0),
    "anchor_deltas": (0.01, 0.0),
    "cls_score": (0.3, 0.0),
    "bbox_pred": (0.03, 1.0),
    "ctrness": (0.3, 0.0),
}


@contextmanager
def detectron2_warns() -> Iterator[None]:
    """Detectron2 uses what is deprecated since: when it is imported, and for the first anchors of a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # of a category that changed over time
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
        yield


def tiny_config(*changes: Mapping[str, Any]) -> Any:
    """Detectron2's default config with a tiny backbone, the parts ``changes``, and no weights to load; a skip where
    there is no Detectron2."""
    with detectron2_warns():
        needs_package("detectron2.modeling")
    from detectron2.config import get_cfg
    from detectron2.modeling import BACKBONE_REGISTRY

    if "tiny_backbone" not in BACKBONE_REGISTRY:
        BACKBONE_REGISTRY.register(tiny_backbone)
    small = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "tiny_backbone",
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "INPUT.MIN_SIZE_TEST": SIZES["min_size"],
        "INPUT.MAX_SIZE_TEST": SIZES["max_size"],
    }
    cfg = get_cfg()
    for part in (small, *changes):
        cfg.merge_from_list([item for pair in part.items() for item in pair])
    return cfg


def patches(names: list[str], width: int) -> Any:
    """A backbone whose cells read patches side by side, so that they lie exactly where their stride says."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import Backbone

    sides = {"res2": 4, "res3": 2, "res4": 2, "res5": 2}
    shapes = {name: ShapeSpec(width * 2**depth, stride=4 * 2**depth) for depth, name in enumerate(sides)}

    class Patches(Backbone):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            channels = 3
            for name, side in sides.items():
                convolution = nn.Conv2d(channels, shapes[name].channels, side, side)
                channels = shapes[name].channels
                self.add_module(name, nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU()))

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            maps = {}
            for name, stage in self.named_children():
                maps[name] = images = stage(images)
            return {name: maps[name] for name in names}

        def output_shape(self) -> dict[str, Any]:
            return {name: shapes[name] for name in names}

    return Patches()


def tiny_backbone(cfg: Any, input_shape: Any) -> Any:
    """Patches, and Detectron2's FPN over them if the config names what enters one."""
    from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7

    width, names, channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS
    bottom_up = patches(cfg.MODEL.RESNETS.OUT_FEATURES, width)
    if not names:
        return bottom_up
    dense = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    return FPN(
        bottom_up, names, channels, top_block=LastLevelP6P7(8 * width, channels) if dense else LastLevelMaxPool()
    )


def build_fcos(cfg: Any, num_classes: int = CLASSES) -> Any:
    """An FCOS on the backbone of ``cfg``; Detectron2 configures it in Python, not in YAML."""
    from detectron2.modeling import FCOS, build_backbone
    from detectron2.modeling.meta_arch.fcos import FCOSHead

    backbone = build_backbone(cfg)
    shapes = list(backbone.output_shape().values())
    return FCOS(
        backbone=backbone,
        head=FCOSHead(input_shape=shapes, conv_dims=[16], num_classes=num_classes),
        num_classes=num_classes,
        test_score_thresh=0.5,
        test_nms_thresh=0.3,  # where boxes of neighbouring cells overlap
        test_topk_candidates=60,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )


def tiny_detectron2(cfg: Any, build: Callable[[Any], Any] | None = None) -> Any:
    """A detector with random weights, uneven enough to detect something in noise."""
    from detectron2.modeling import build_model

    with torch.random.fork_rng():
        torch.manual_seed(3)
        detector = (build or build_model)(cfg)
        for name, layer in detector.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = None
            spread = OUTPUTS.get(name.rpartition(".")[2])
            if spread and hasattr(layer, "weight"):
                nn.init.normal_(layer.weight, std=spread[0])
                nn.init.constant_(layer.bias, spread[1])
        with torch.no_grad(), detectron2_warns():
            # The statistics of noise keep random features at about 1.
            detector.backbone.train()(torch.randn(4, 3, 128, 128) * 60)
            detector.eval()([{"image": torch.zeros(3, 64, 64)}])
    return detector


class Detectron2Case(Case):
    """Inputs are dicts, results hold ``Instances``."""

    package, replaced = "sal-detectron2", "NMS and top-k of fast_rcnn_inference, or of the dense forward_inference"

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        from detectron2.layers import batched_nms

        detector = self.adapter.detector
        if hasattr(detector, "roi_heads"):
            own = self.predictors()[-1]
            threshold, limit = own.test_nms_thresh, own.test_topk_per_image
        else:
            threshold, limit = detector.test_nms_thresh, detector.max_detections_per_image
        keep = [batched_nms(image.boxes, image.scores, image.labels, threshold)[:limit] for image in candidates]
        return [image[rows] for image, rows in zip(candidates, keep, strict=True)]

    def predictors(self) -> list[Any]:
        """The box predictors: one, or one for each stage of a cascade."""
        predictor = self.adapter.detector.roi_heads.box_predictor
        return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]

    def as_dicts(self, results: Any) -> list[dict[str, Tensor]]:
        names = {"pred_boxes": "boxes", "pred_classes": "labels"}
        return [
            {names.get(name, name): getattr(value, "tensor", value) for name, value in instances.get_fields().items()}
            for instances in (result["instances"] for result in results)
        ]

    def state(self) -> Any:
        plain = {
            f"{path}.{name}": value
            for path, module in self.adapter.detector.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str))
        }
        return super().state(), plain

    def silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        detector = self.adapter.detector
        for own in self.predictors() if hasattr(detector, "roi_heads") else [detector]:
            monkeypatch.setattr(own, "test_score_thresh", 1.0)


def case_of(*changes: Mapping[str, Any], build: Callable[[Any], Any] | None = None) -> Callable[[], Case]:
    """Noise of three sizes, so that images of one batch are scaled and padded differently."""

    def case() -> Case:
        adapter = Detectron2Adapter(tiny_detectron2(tiny_config(*changes), build), **SIZES)
        return Detectron2Case(adapter, noise((70, 110), (90, 64), (200, 150)))

    return case


CASES: dict[str, Callable[[], Case]] = {
    "faster_rcnn_fpn": case_of(R_CNN),
    "mask_rcnn_fpn": case_of(R_CNN, MASK),
    "mask_rcnn_c4": case_of(R_CNN, C4, MASK),
    "keypoint_rcnn_fpn": case_of(R_CNN, {"MODEL.KEYPOINT_ON": True}),
    "cascade_mask_rcnn_fpn": case_of(R_CNN, CASCADE, MASK),
    "retinanet": case_of(RETINANET),
    "fcos": case_of(RETINANET, build=build_fcos),
}
