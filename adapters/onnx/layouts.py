"""What the inputs and outputs of an exported detector mean: the graph itself does not say."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec

from iou_refiner import DataError
from iou_refiner.checks import check_choice, check_fraction, check_positive, did_you_mean

#: The longest side of a network input.
MOST_PIXELS = 16_384
_MOST_BYTES = 1_000_000  # of the file of a layout


@dataclass(frozen=True)
class OnnxLayout:
    """How an image enters an exported detector, and which tensors of its graph hold boxes, scores and feature maps.

    Tensors are named as the graph names them. Any tensor will do, not only an output: where a graph ends in its own
    NMS, name those before it. Boxes are rows of a tensor (1, N, columns) or (N, columns).

    Args:
        boxes: tensor whose first four columns are the boxes. Default: the only output.
        scores: tensor of class scores, a column per class. Default: the columns of ``boxes`` after the first four.
        labels: tensor of class numbers (1, N) or (N,), where a box has one score and not one per class, as after an
            NMS inside the graph. The same name as ``boxes``: its last column.
        transposed: the tensors are (1, columns, N).
        box_format: ``"xyxy"``, ``"xywh"`` (corner and size), ``"cxcywh"`` (center and size), or ``"yolox"``: center and
            log size in cells of the strides 8, 16 and 32, as YOLOX exports without ``--decode_in_inference``.
        normalized: boxes are fractions of the network input, not pixels of it.
        objectness: the first score is no class, but multiplies those of all classes.
        activation: what turns the scores into probabilities: ``"none"``, ``"sigmoid"``, or ``"softmax"``, where the
            last column stands for "no object".
        fit: how an image meets the size of the input: ``"letterbox"`` (scaled to fit, in the top left corner),
            ``"letterbox-center"``, ``"squash"`` (each side scaled to its own), or ``"none"`` (enters as it is).
        channels: ``"RGB"`` or ``"BGR"``.
        scale, mean, std: a value from 0 to 255 enters as ``(value * scale - mean) / std``; mean and std per channel, in
            the order of ``channels``.
        pad_value: what a letterbox is filled with, from 0 to 255.
        input_size: ``(height, width)`` of the input, where the graph leaves it open; at most 16,384 a side.
        features: tensors to use as feature maps, finest first. Default: the inputs of the three stems of a YOLOX head.
        strides: pixels per cell of each feature map. Default: input size divided by map size.
        score_threshold: a box enters the candidates once for each class whose score is above it.
        nms_threshold: IoU above which the detector's own greedy NMS removes a box of the same class; None for a
            detector without NMS.
        category_ids: category id of each label. Default: the official ones where there are the 80 classes of COCO, else
            labels are category ids.

    Raises:
        ValueError: a value is out of range, or two contradict each other.
    """

    boxes: str | None = None
    scores: str | None = None
    labels: str | None = None
    transposed: bool = False
    box_format: str = "xyxy"
    normalized: bool = False
    objectness: bool = False
    activation: str = "none"
    fit: str = "squash"
    channels: str = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    pad_value: float = 114.0
    input_size: tuple[int, ...] | None = None
    features: tuple[str, ...] | None = None
    strides: tuple[float, ...] | None = None
    score_threshold: float = 0.01
    nms_threshold: float | None = 0.5
    category_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std", "input_size", "features", "strides", "category_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        check_choice("box_format", self.box_format, ["xyxy", "xywh", "cxcywh", "yolox"])
        check_choice("activation", self.activation, ["none", "sigmoid", "softmax"])
        check_choice("fit", self.fit, ["letterbox", "letterbox-center", "squash", "none"])
        check_choice("channels", self.channels, ["RGB", "BGR"])
        for name, count in {"mean": 3, "std": 3, "input_size": 2}.items():
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"`{name}` must hold {count} numbers, got {value}.")
        check_positive("scale", self.scale)
        for name in ("std", "input_size", "strides"):
            for index, value in enumerate(getattr(self, name) or ()):
                check_positive(f"{name}[{index}]", value)
        self._check_ranges()
        check_fraction("score_threshold", self.score_threshold)
        if self.nms_threshold is not None:
            check_fraction("nms_threshold", self.nms_threshold)
        if self.labels is not None and (self.objectness or self.activation == "softmax"):
            raise ValueError(
                "`labels` goes with one score per box, `objectness` and `activation='softmax'` with one per class. "
                "Give the one or the other."
            )

    def _check_ranges(self) -> None:
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"`mean` must hold finite numbers, got {self.mean}.")
        if not 0 <= self.pad_value <= 255:
            raise ValueError(f"`pad_value` must lie in [0, 255], got {self.pad_value!r}.")
        if self.input_size is not None and max(self.input_size) > MOST_PIXELS:
            raise ValueError(f"`input_size` must be at most {MOST_PIXELS} pixels a side, got {self.input_size}.")
        if any(not 0 <= value < 2**63 for value in self.category_ids or ()):
            raise ValueError(f"`category_ids` must be 0 or more and fit in 64 bits, got {self.category_ids}.")

    def replace(self, **changes: Any) -> OnnxLayout:
        """A copy with some values exchanged; an unknown name is refused in words."""
        for name in changes:
            check_choice("setting", name, [field.name for field in fields(self)])
        return replace(self, **changes)

    @classmethod
    def read(cls, path: Path) -> OnnxLayout:
        """A layout from a JSON file, an object of fields; ``"layout"`` may name one of :data:`LAYOUTS` to start from.

        Raises:
            DataError: the file is unreadable, no JSON object, or holds what a layout does not.
        """
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise DataError(f"{path} must hold a layout, of at most {_MOST_BYTES:,} bytes.")
            data = json.loads(path.read_text(), parse_constant=_no_number)
        except DataError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read as JSON ({error}).") from None
        if not isinstance(data, dict):
            raise DataError(f"{path} must hold a JSON object, the fields of an OnnxLayout, got {type(data).__name__}.")
        base, known = data.pop("layout", None), [field.name for field in fields(cls)]
        if base is not None and str(base) not in LAYOUTS:
            raise DataError(
                f'{path}: "layout" must be one of {", ".join(LAYOUTS)}, got {base!r}.{did_you_mean(str(base), LAYOUTS)}'
            )
        for name in data:
            if name not in known:
                raise DataError(f"{path}: a layout has no {name!r}.{did_you_mean(name, known)}")
        start = asdict(LAYOUTS[base]) if base else {}
        try:
            return msgspec.convert(start | data, cls)
        except (msgspec.ValidationError, OverflowError) as error:
            raise DataError(f"{path}: {str(error).rstrip('.')}.") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON; every number must be finite")


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_DETR = OnnxLayout(boxes="pred_boxes", scores="logits", box_format="cxcywh", normalized=True, nms_threshold=None)

#: The layouts of common exports, by name, with the thresholds their own projects use.
LAYOUTS = {
    # https://github.com/Megvii-BaseDetection/YOLOX, tools/export_onnx.py; 0.01 and 0.65 are those of its evaluation.
    "yolox": OnnxLayout(
        box_format="yolox", objectness=True, fit="letterbox", channels="BGR", scale=1.0, nms_threshold=0.65
    ),
    # Ultralytics, YOLOv8 and YOLO11, `export(format="onnx")`: (1, 4 + classes, N), scores after the sigmoid.
    "yolov8": OnnxLayout(box_format="cxcywh", transposed=True, fit="letterbox-center", nms_threshold=0.7),
    # Hugging Face, exported by optimum. DETR is trained with "no object" as its last class, RT-DETR without.
    "detr": _DETR.replace(activation="softmax", **_IMAGENET),
    "rt-detr": _DETR.replace(activation="sigmoid"),
}
