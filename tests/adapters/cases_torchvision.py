"""torchvision's detectors as cases of the contract: tiny ones with seeded random weights, and a trained one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from iou_refiner.adapters.torchvision import TorchvisionAdapter
from tests.adapters.case import Case, example, noise, photographs

CHANNELS, CLASSES = 16, 4


class TinyFPN(nn.Module):
    """Images (N, 3, H, W) to an FPN of strides 4 and 8, and what ``extra`` makes of it: by default a level of stride 16
    for the RPN alone."""

    def __init__(self, extra: ExtraFPNBlock | None = None, channels: int = CHANNELS) -> None:
        super().__init__()
        self.out_channels = channels
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU())
        self.fpn = ops.FeaturePyramidNetwork([8, 12], channels, extra or LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images)
        maps: dict[str, Tensor] = self.fpn(OrderedDict([("0", fine), ("1", self.coarse(fine))]))
        return maps


def extra_heads(kind: str) -> dict[str, Any]:
    """What Mask and Keypoint R-CNN have beside the box head."""
    pool = ops.MultiScaleRoIAlign(["0", "1"], 14, 2)
    if kind == "mask_rcnn":
        head, predictor = MaskRCNNHeads(CHANNELS, (8,), 1), MaskRCNNPredictor(8, 8, CLASSES)
        return {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
    if kind == "keypoint_rcnn":
        head, predictor = KeypointRCNNHeads(CHANNELS, (8,)), KeypointRCNNPredictor(8, 3)
        return {"keypoint_roi_pool": pool, "keypoint_head": head, "keypoint_predictor": predictor}
    return {}


def rcnn(kind: str) -> nn.Module:
    """One of the Faster R-CNN family."""
    family = {
        "faster_rcnn": detection.FasterRCNN,
        "mask_rcnn": detection.MaskRCNN,
        "keypoint_rcnn": detection.KeypointRCNN,
    }
    extra = extra_heads(kind)
    torch.manual_seed(3)  # after the extra heads, so that all of the family share one box path
    detector = family[kind](
        TinyFPN(),
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
        box_roi_pool=ops.MultiScaleRoIAlign(["0", "1"], 7, 2),
        box_head=TwoMLPHead(CHANNELS * 49, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES),
        box_score_thresh=0.25,  # cuts among the random scores, and before the limit of 100 does
        min_size=96,
        max_size=160,
        rpn_post_nms_top_n_test=60,
        **extra,
    )
    for linear in (detector.roi_heads.box_predictor.cls_score, detector.roi_heads.box_predictor.bbox_pred):
        nn.init.normal_(linear.weight, std=0.3)
    return detector


#: Both the score threshold and the limits on candidates and detections cut among the random scores.
LIMITS = {"topk_candidates": 60, "detections_per_img": 40}


def pyramid_detector(kind: type[nn.Module], anchors: AnchorGenerator, channels: int, score_thresh: float) -> nn.Module:
    """RetinaNet or FCOS, with levels of strides 4, 8, 16 and 32."""
    backbone = TinyFPN(LastLevelP6P7(channels, channels), channels)
    limits = {**LIMITS, "score_thresh": score_thresh}
    return kind(backbone, CLASSES, anchor_generator=anchors, min_size=96, max_size=160, **limits)


def ssd(head: Callable[..., nn.Module], size: tuple[int, int], steps: list[int] | None) -> nn.Module:
    """SSD of a fixed input size ``(width, height)``, with maps of about 1/4, 1/8 and 1/16 of it."""
    boxes = DefaultBoxGenerator([[2], [2], [2]], min_ratio=20, max_ratio=60, steps=steps)
    head = head([CHANNELS] * 3, boxes.num_anchors_per_location(), CLASSES)
    return SSD(TinyFPN(), boxes, size, CLASSES, head=head, score_thresh=0.4, **LIMITS)


def retinanet() -> nn.Module:
    anchors = AnchorGenerator(((12, 16), (24, 32), (48, 64), (96, 112)), ((0.5, 1.0, 2.0),) * 4)
    return pyramid_detector(detection.RetinaNet, anchors, CHANNELS, score_thresh=0.7)


def fcos() -> nn.Module:
    anchors = AnchorGenerator(((4,), (8,), (16,), (32,)), ((1.0,),) * 4)
    return pyramid_detector(detection.FCOS, anchors, 32, score_thresh=0.6)  # its head normalises groups of 32


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "faster_rcnn": lambda: rcnn("faster_rcnn"),
    "mask_rcnn": lambda: rcnn("mask_rcnn"),
    "keypoint_rcnn": lambda: rcnn("keypoint_rcnn"),
    "retinanet": retinanet,
    "fcos": fcos,
    "ssd": lambda: ssd(SSDHead, (132, 100), [4, 8, 16]),
    "ssdlite": lambda: ssd(lambda *sizes: SSDLiteHead(*sizes, nn.BatchNorm2d), (100, 100), None),
}


def make_uneven(head: nn.Module) -> None:
    """Uneven scores and boxes from the head of a one-stage detector, which when new detects nothing."""
    for name, module in head.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, 2.0 if isinstance(head, FCOSHead) and name.endswith("bbox_reg") else 0.0)


def tiny(name: str) -> TorchvisionAdapter:
    """A detector with random weights, uneven enough to detect something in noise."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        detector = BUILDERS[name]()
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        if hasattr(detector, "head"):
            make_uneven(detector.head)
    return TorchvisionAdapter(detector.eval())


def tiny_case(name: str) -> Case:
    """Images of three sizes, so that within one batch they are scaled and padded differently."""
    return Case(tiny(name), noise((70, 110), (90, 64), (200, 150)))


CASES: dict[str, Callable[[], Case]] = {
    **{name: partial(tiny_case, name) for name in BUILDERS},
    "trained faster_rcnn": lambda: Case(example("faster_rcnn"), photographs()),
}
