"""Detectors of transformers as cases of the contract: its own code, built small, with seeded random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps
from iou_refiner.adapters.transformers import TransformersAdapter
from tests.adapters.case import Case, noise
from tests.kit.needs import needs_package

CLASSES, QUERIES, WIDTH = 3, 12, 32
TRANSFORMER = {
    "d_model": WIDTH,
    "num_queries": QUERIES,
    "num_labels": CLASSES,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
}
HYBRID = {"encoder_hidden_dim": WIDTH, "encoder_in_channels": [16, 24, 32], "decoder_in_channels": [WIDTH] * 3}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}
SQUASHED = {"height": 128, "width": 192}
SHORTEST = {"shortest_edge": 128, "longest_edge": 224}


def rt_detr(transformers: Any, version: str) -> tuple[Any, Any]:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, layer_type="basic", out_features=["stage2", "stage3", "stage4"], **STAGES
    )
    config = getattr(transformers, f"{version}Config")(backbone_config=backbone, **TRANSFORMER, **HYBRID)
    return config, transformers.RTDetrImageProcessor(size=SQUASHED)


def d_fine(transformers: Any) -> tuple[Any, Any]:
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        **STAGES,
    )
    config = transformers.DFineConfig(
        backbone_config=backbone, max_num_bins=8, depth_mult=0.34, **TRANSFORMER, **HYBRID
    )
    return config, transformers.RTDetrImageProcessor(size=SQUASHED)


def detr(transformers: Any, kind: str, stages: list[str], **options: Any) -> tuple[Any, Any]:
    backbone = transformers.ResNetConfig(embedding_size=8, layer_type="basic", out_features=stages, **STAGES)
    config = getattr(transformers, f"{kind}Config")(backbone_config=backbone, **TRANSFORMER, **options)
    return config, getattr(transformers, f"{kind}ImageProcessor")(size=SHORTEST)


def perturbed(transformers: Any, config: Any, seed: int) -> Any:
    """A model with random weights, uneven enough to detect something in noise; boxes are small, within the image."""
    # Coarse maps weigh little in the fine ones, so that a patch of the image shows where it is.
    spread = {"class": 2, "bbox_predictor": 1, "lateral_convs": 0.25, "bbox": 0.25, "reference_points": 0.1}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForObjectDetection.from_config(config).eval()
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                values.data.uniform_(0.5, 2)
            elif name.endswith("weight") and values.ndim == 1:
                values.data.uniform_(0.8, 1.2)
            elif name.endswith("query_position_embeddings.weight"):
                values.data.normal_(std=8)  # so that attention, and with it the boxes, differ from query to query
            elif name.endswith("weight") and "sampling_offsets" not in name:
                gain = next((gain for part, gain in spread.items() if part in name), 1)
                values.data.normal_(std=gain / values[0].numel() ** 0.5)
            elif re.search(r"class|bbox.*2\.bias", name):
                values.data.zero_()
                if "decoder" not in name and "bbox" in name:
                    values.data[2:] = -0.5 if "enc_bbox" in name else -1.0
    return model


class TransformersCase(Case):
    """A model and its processor, called for detections at every score."""

    package, replaced = "transformers", "post_process_object_detection"

    # Boxes go from fractions of the image to pixels of the network and back: float32 rounds them differently.
    tolerance = 1e-4
    options: ClassVar[dict[str, Any]] = {"threshold": 0.0}

    def as_documented(self, images: list[Any]) -> list[dict[str, Tensor]]:
        """The lines of transformers' own documentation."""
        inputs = self.adapter.processor(images=images, return_tensors="pt")
        with torch.no_grad():
            outputs = self.adapter.model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        return self.adapter.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)

    def own(self) -> Any:
        return self.as_documented(self.images)

    def own_one(self) -> Any:
        return self.as_documented(self.images[:1])

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """There is none: what transformers selects it does not suppress."""
        return candidates

    def silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A score that is not a number is above no threshold."""
        for name, layer in self.adapter.model.named_modules():
            if isinstance(layer, nn.Linear) and "class" in name:
                monkeypatch.setitem(layer._parameters, "bias", torch.full_like(layer.bias, torch.nan))


def case_of(
    build: Callable[..., tuple[Any, Any]], *arguments: Any, seed: int = 1, **options: Any
) -> Callable[[], TransformersCase]:
    """Noise of three sizes, so that images of one batch are scaled and padded differently."""

    def case() -> TransformersCase:
        transformers = needs_package("transformers")
        config, processor = build(transformers, *arguments, **options)
        adapter = TransformersAdapter(perturbed(transformers, config, seed), processor)
        return TransformersCase(adapter, noise((130, 210), (190, 140), (170, 170)))

    return case


CASES: dict[str, Callable[[], Case]] = {
    "rt_detr": case_of(rt_detr, "RTDetr", seed=0),
    "rt_detr_v2": case_of(rt_detr, "RTDetrV2"),
    "d_fine": case_of(d_fine),
    "detr": case_of(detr, "Detr", ["stage4"]),
    "deformable_detr": case_of(
        detr, "DeformableDetr", ["stage2", "stage3", "stage4"], num_feature_levels=3, disable_custom_kernels=True
    ),
}
