"""Twins of what transformers detects with: objects of the same class that share every weight and call a suppression.

The twin of a model suppresses the candidates among its outputs and adds the detections to these; the twin of an image
processor takes them from there in ``post_process_object_detection``. So the suppression runs once for a batch, before a
pipeline takes the batch apart and moves it to the CPU.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps
from iou_refiner.adapters.twins import shallow
from iou_refiner.detector.adapter import Suppression

# The output a model's twin adds: detections (N, M, 6 or 7), rows of box in fractions of the image, score, label and, if
# predicted, IoU. One tensor with the images first, since that is what a pipeline can split into images.
_DETECTIONS = "suppressed_detections"


def twin_model(model: Any, processor: Any, suppression: Suppression) -> Any:
    """A shallow copy of the model that adds to its outputs the detections that ``suppression`` makes of them."""
    twin = shallow(model)

    @functools.wraps(model.forward)
    def forward(pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Any) -> Any:
        outputs, features = _outputs_and_maps(model, pixel_values, pixel_mask, **kwargs)
        detections = suppression(features, _candidates(processor, outputs, features.image_sizes))
        outputs[_DETECTIONS] = _one_tensor(detections, features.image_sizes)
        return outputs

    twin.forward = forward
    return twin


def _outputs_and_maps(
    model: Any, pixel_values: Tensor, pixel_mask: Tensor | None, **kwargs: Any
) -> tuple[Any, FeatureMaps]:
    """The model's outputs, and its feature maps.

    RT-DETR and D-FINE return the maps of their encoder. The encoder of the DETRs turns them into a sequence, so theirs
    are those of the backbone: all it has, also where the transformer reads only the coarsest.
    """
    image_sizes = _image_sizes(pixel_values, pixel_mask)
    if hasattr(model.config, "feat_strides"):
        outputs = model.forward(pixel_values, pixel_mask=pixel_mask, **kwargs)
        levels, strides = outputs.encoder_last_hidden_state, model.config.feat_strides
        return outputs, FeatureMaps(tuple(levels), tuple(strides), image_sizes)
    levels_and_masks: list[tuple[Tensor, Tensor]] = []
    outer = shallow(model)
    outer._modules["model"] = inner = shallow(model.model)
    inner._modules["backbone"] = backbone = shallow(inner.backbone)

    def record(*args: Any, **kwargs: Any) -> Any:
        levels_and_masks.extend(type(backbone).forward(backbone, *args, **kwargs))
        return levels_and_masks

    backbone.forward = record
    outputs = outer.forward(pixel_values, pixel_mask=pixel_mask, **kwargs)
    levels = [level for level, _ in levels_and_masks]
    # Powers of two; rounding up to whole cells blurs them least on the longer side.
    axis = 2 if pixel_values.shape[2] >= pixel_values.shape[3] else 3
    strides = [2.0 ** round(math.log2(pixel_values.shape[axis] / level.shape[axis])) for level in levels]
    return outputs, FeatureMaps(tuple(levels), tuple(strides), image_sizes)


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[tuple[int, int], ...]:
    """``(height, width)`` of each image in the padded batch."""
    if pixel_mask is None:
        height, width = pixel_values.shape[2:]
        return ((height, width),) * len(pixel_values)
    return tuple(zip(pixel_mask.amax(2).sum(1).tolist(), pixel_mask.amax(1).sum(1).tolist(), strict=True))


def _candidates(processor: Any, outputs: Any, image_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
    """The rows the processor selects, whatever their score, in its order; boxes as they are, also beyond the image."""
    sizes = torch.tensor(image_sizes, dtype=torch.float32, device=outputs.pred_boxes.device)
    results = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)
    return [Detections(image["boxes"], image["scores"], image["labels"]) for image in results]


def _one_tensor(detections: list[Detections], image_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Detections of a batch in one tensor, see ``_DETECTIONS``; the shorter lists are filled up with NaN."""
    tables = []
    for image, (height, width) in zip(detections, image_sizes, strict=True):
        boxes = image.boxes / image.boxes.new_tensor([width, height, width, height])
        columns = [boxes, image.scores[:, None], image.labels[:, None].to(boxes.dtype)]
        tables.append(torch.cat(columns if image.ious is None else [*columns, image.ious[:, None]], 1))
    return nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=math.nan)


def twin_processor(processor: Any) -> Any:
    """A shallow copy of the processor that returns the detections which the twin of the model adds to its outputs."""
    twin = copy.copy(processor)

    def post_process_object_detection(
        outputs: Any, threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, Tensor]]:
        tables = outputs[_DETECTIONS]
        sizes = torch.as_tensor([(1, 1)] * len(tables) if target_sizes is None else target_sizes)
        if len(sizes) != len(tables):
            raise ValueError(f"`target_sizes` must give one size per image: got {len(sizes)} for {len(tables)} images.")
        results = []
        for table, (height, width) in zip(tables, sizes.tolist(), strict=True):
            rows = table[table[:, 4] > threshold]  # NaN, which fills up, is above nothing
            boxes = rows[:, :4] * rows.new_tensor([width, height, width, height])
            result = {"scores": rows[:, 4], "labels": rows[:, 5].long(), "boxes": boxes}
            results.append(result if rows.shape[1] == 6 else {**result, "ious": rows[:, 6]})
        return results

    twin.post_process_object_detection = post_process_object_detection
    return twin


def twin_pipeline(pipeline: Any, model: Any, processor: Any) -> Any:
    """A shallow copy of the pipeline around the twins; its detections hold an ``iou`` where there is one."""
    twin = copy.copy(pipeline)
    twin.model, twin.image_processor = model, processor

    def postprocess(outputs: Any, **parameters: Any) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = type(pipeline).postprocess(twin, outputs, **parameters)
        # The pipeline copies what it knows into its own form, row by row; the IoU is joined by the same rows.
        (rows,) = processor.post_process_object_detection(outputs, **parameters)
        if "ious" in rows:
            for detection, iou in zip(results, rows["ious"].tolist(), strict=True):
                detection["iou"] = iou
        return results

    twin.postprocess = postprocess
    return twin
