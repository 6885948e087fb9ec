"""The compiled module ``mmcv._ext`` for tests: the kernels that mmdet's detectors call here, from torchvision.

mmcv-lite is all of mmcv's Python without its kernels, and mmdet does not import without them. Compiling them takes most
of an hour. With this module in their place mmdet runs as it is; a kernel that is not here says so when it is called.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision import ops


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Rows (K,) of ``boxes`` (N, 4) xyxy that greedy NMS keeps, by falling score."""
    if offset != 0:
        raise NotImplementedError(f"`offset` must be 0 here, got {offset}.")
    return ops.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    maps: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average RoIAlign of ``rois`` (R, 5) on ``maps`` (N, C, H, W), written into ``output`` (R, C, h, w)."""
    if pool_mode != 1:
        raise NotImplementedError(f"`pool_mode` must be 1 (average) here, got {pool_mode}.")
    size = (aligned_height, aligned_width)
    output.copy_(ops.roi_align(maps, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_maps: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """The gradient of :func:`roi_align_forward` to the maps, written into ``grad_maps``."""
    with torch.enable_grad():
        maps = torch.zeros_like(grad_maps).requires_grad_()
        size = (aligned_height, aligned_width)
        output = ops.roi_align(maps, rois, size, spatial_scale, sampling_ratio, aligned)
    grad_maps.copy_(torch.autograd.grad(output, maps, grad_output)[0])


def absent(name: str) -> Callable[..., Any]:
    """A kernel of mmcv that is not here."""
    if name.startswith("__"):  # not a kernel: Python itself asks whether a module has these
        raise AttributeError(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"mmcv's kernel {name} is not compiled here; this needs the compiled mmcv.")

    return kernel


def install() -> None:
    """Put the stand-in where mmcv looks for its kernels, unless they are there."""
    if "mmcv._ext" in sys.modules or importlib.util.find_spec("mmcv._ext") is not None:
        return
    module = ModuleType("mmcv._ext", __doc__)
    module.__spec__ = ModuleSpec("mmcv._ext", loader=None)
    kernels = {"nms": nms, "roi_align_forward": roi_align_forward, "roi_align_backward": roi_align_backward}
    vars(module).update(kernels, __getattr__=absent)
    sys.modules["mmcv._ext"] = module
