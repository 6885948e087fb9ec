"""Exported detectors: a YOLOX graph in an ONNX file, run by onnxruntime on the CPU.

An exported graph hides its feature maps, but computes them all the same. The graph is rewritten in memory so that it
also returns them; the file is only read. The detector's input is the image itself, RGB (H, W, 3) uint8 of any size:
letterboxing belongs to the detector, and the frame of each image says where it went.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iou_refiner import DataError, Detections, FeatureMaps, Frame
from iou_refiner._checks import check_choice, check_fraction, did_you_mean, require
from iou_refiner.boxes import clip_boxes, valid_boxes
from iou_refiner.extraction import Suppression
from iou_refiner.nms import nms

_PURPOSE = "An ONNX detector"
_YOLOX_STRIDES = (8, 16, 32)
_PAD_VALUE = 114.0
# The official category ids of COCO's 80 classes are 1 to 90 without these.
_COCO_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_IDS = dict(enumerate(sorted(set(range(1, 91)) - _COCO_GAPS)))
# Operators that only rearrange values, passed through on the way from the output back to the head.
_RESHAPING = {"Flatten", "Identity", "Reshape", "Transpose"}


class OnnxAdapter:
    """A detector exported to ONNX. It is called like one: ``adapter([rgb, ...])`` gives its own result.

    Args:
        path: the ONNX file: one float32 input (1, 3, H, W) of fixed size. Never changed.
        features: names of the tensors in the graph to use as feature maps, finest first. Default: the inputs of the
            three stems of the YOLOX head.
        strides: pixels per cell of each feature map. Default: input size divided by map size.
        layout: what input and output mean. ``"yolox"``: BGR from 0 to 255, letterboxed to the top left corner; rows of
            (x, y offset in cells, log width, log height in cells, objectness, class scores), as YOLOX exports without
            ``--decode_in_inference``.
        score_threshold: boxes enter the candidates once for each class whose score (objectness times class score) is
            above it. The default is the one YOLOX evaluates with.
        nms_threshold: IoU above which the detector's own suppression removes a box.

    Raises:
        TypeError: ``path`` is no path.
        DataError: the file cannot be read, or is not of the layout.
        ValueError: the feature maps cannot be found, or do not fit together.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        features: Sequence[str] | None = None,
        strides: Sequence[float] | None = None,
        layout: str = "yolox",
        score_threshold: float = 0.01,
        nms_threshold: float = 0.65,
    ):
        check_choice("layout", layout, _DECODERS)
        check_fraction("score_threshold", score_threshold)
        check_fraction("nms_threshold", nms_threshold)
        if not isinstance(path, (str, Path)):
            raise TypeError(f"The ONNX adapter takes the path of an ONNX file, got {type(path).__name__}.")
        self.path = Path(path)
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        model, self._fingerprint = _load(self.path)
        _check_raw(model, self.path)
        self._decode = _DECODERS[layout]
        self._outputs = [output.name for output in model.graph.output]
        if features is None:
            self.features = _yolox_neck(model, self.path)
        else:
            self.features = _checked_names(model, features, self.path)
            # Other maps are another detector to whoever learned from them.
            self._fingerprint = hashlib.sha256(f"{self._fingerprint} {self.features}".encode()).hexdigest()
        self._session = _session(model, self.features)
        self._input, self.input_size = _input(self._session, self.path)
        self._look_once(strides)

    def _look_once(self, strides: Sequence[float] | None) -> None:
        """Learn what the graph returns, and refuse what does not fit, from one blank image."""
        blank = np.zeros((*self.input_size, 3), np.uint8)
        outputs, maps = self._forward(letterbox(blank, self.input_size)[0])
        num_classes = self._decode(outputs, self.input_size)[1].shape[1]
        self.category_ids: dict[int, int] | None = _COCO_IDS if num_classes == len(_COCO_IDS) else None
        if strides is None:
            strides = [_stride(name, level, self.input_size) for name, level in zip(self.features, maps, strict=True)]
        self.strides = FeatureMaps(tuple(maps), tuple(strides), (self.input_size,)).strides
        if list(self.strides) != sorted(self.strides):
            raise ValueError(f"`features` must go from fine to coarse, got strides {self.strides}. Reorder the names.")
        self._map_shapes = [level.shape[1:] for level in maps]

    @classmethod
    def from_name(cls, name: str) -> OnnxAdapter:
        """The YOLOX export in the file ``name``."""
        return cls(name)

    @property
    def detector(self) -> OnnxAdapter:
        """What is called for the detector's own result: this object."""
        return self

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    def to(self, device: torch.device | str) -> OnnxAdapter:
        """Stay on the CPU; any other device is refused."""
        if torch.device(device).type != "cpu":
            raise ValueError(
                f"`device` must be 'cpu' for an ONNX detector, which onnxruntime runs there, got {str(device)!r}. "
                "Use the detector it was exported from to run on another device."
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the file (and of the weight files beside it); with ``features``, of that and their names."""
        return self._fingerprint

    def settings(self) -> str:
        """Where the features are read and from which score on boxes are candidates."""
        return f"features={self.features} score_threshold={self.score_threshold}"

    def prepare(self, rgb: np.ndarray) -> tuple[np.ndarray, Frame]:
        """The image itself: RGB (H, W, 3) uint8 is what the detector takes."""
        _check_image("rgb", rgb)
        return rgb, Frame((rgb.shape[0], rgb.shape[1]))

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        """The detector's own result, with greedy NMS per class; form as :meth:`run`."""
        return self.run(self.suppress, images)

    def suppress(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        """The detector's own suppression, as a stage: greedy NMS per class at ``nms_threshold``."""
        return [
            found[nms(found.boxes, found.scores, found.labels, threshold=self.nms_threshold)] for found in candidates
        ]

    def run(self, stage: Suppression, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        """The detector's call with ``stage`` as its suppression.

        Args:
            stage: features and candidates in, detections out; network frame.
            images: RGB (H, W, 3) uint8 each, of any sizes.

        Returns:
            One dict per image, rows as the stage ordered them: ``boxes`` (N, 4) float32 xyxy in pixels of the image,
            clipped to it, ``scores`` (N,), ``labels`` (N,) from 0, and ``ious`` (N,) if the stage gave them.
        """
        results = []
        with torch.no_grad():
            features, candidates, frames = self.extract(images)
            for found, frame in zip(stage(features, candidates), frames, strict=True):
                boxes = clip_boxes(frame.to_image(found.boxes), frame.image_size)
                result = {"boxes": boxes, "scores": found.scores, "labels": found.labels}
                results.append(result if found.ious is None else result | {"ious": found.ious})
        return results

    def extract(self, images: Sequence[np.ndarray]) -> tuple[FeatureMaps, list[Detections], list[Frame]]:
        """Feature maps, candidates before suppression, and the letterbox frame of each image.

        Candidates are clipped to the image, so that none reaches into the padding.
        """
        levels = [torch.empty(len(images), *shape) for shape in self._map_shapes]
        sizes, candidates, frames = [], [], []
        for index, rgb in enumerate(images):
            _check_image(f"images[{index}]", rgb)
            pixels, size, frame = letterbox(rgb, self.input_size)
            outputs, maps = self._forward(pixels)
            for level, found in zip(levels, maps, strict=True):
                level[index] = found[0]
            boxes, scores = self._decode(outputs, self.input_size)
            candidates.append(self._candidates(clip_boxes(boxes, size), scores))
            sizes.append(size)
            frames.append(frame)
        return FeatureMaps(tuple(levels), self.strides, tuple(sizes)), candidates, frames

    def _forward(self, pixels: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
        values = self._session.run([*self._outputs, *self.features], {self._input: pixels})
        tensors = [torch.from_numpy(value) for value in values]
        return tensors[: len(self._outputs)], tensors[len(self._outputs) :]

    def _candidates(self, boxes: Tensor, scores: Tensor) -> Detections:
        rows, labels = torch.nonzero((scores > self.score_threshold) & valid_boxes(boxes)[:, None]).unbind(1)
        return Detections(boxes[rows], scores[rows, labels], labels)


def letterbox(rgb: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int], Frame]:
    """An image scaled to fit ``size`` and padded to it below and to the right, as YOLOX is trained to see it.

    Args:
        rgb: (H, W, 3) uint8.
        size: ``(height, width)`` of the network input.

    Returns:
        The network input (1, 3, height, width) float32, BGR from 0 to 255; the ``(height, width)`` the image has in it;
        and the frame from the image to it.
    """
    height, width = rgb.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.from_numpy(rgb[:, :, ::-1].astype(np.float32)).permute(2, 0, 1)[None]
    # No antialiasing, as in training. On 2,041 photographs person AP is 38.65 with this, 38.67 with antialiasing.
    pixels = torch.nn.functional.interpolate(pixels, inner, mode="bilinear", align_corners=False)
    canvas = pixels.new_full((1, 3, *size), _PAD_VALUE)
    canvas[:, :, : inner[0], : inner[1]] = pixels
    return canvas.numpy(), inner, Frame.resize((height, width), inner)


def _decode_yolox(outputs: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) xyxy in the network frame and scores (N, classes), from what a YOLOX graph returns."""
    grids = [(size[0] // stride, size[1] // stride, stride) for stride in _YOLOX_STRIDES]
    cells = sum(height * width for height, width, _ in grids)
    shapes = [tuple(output.shape) for output in outputs]
    if len(shapes) != 1 or shapes[0][:2] != (1, cells) or len(shapes[0]) != 3 or shapes[0][2] < 6:
        raise DataError(
            f'`layout="yolox"` needs one output (1, {cells}, 5 + classes) for an input of {size[0]} x {size[1]}, '
            f"the graph returns {shapes}."
        )
    corners = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1) * s for h, w, s in grids]
    corner = torch.cat(corners)  # (N, 2), x and y of each cell's corner
    stride = torch.cat([torch.full((h * w, 1), float(s)) for h, w, s in grids])  # (N, 1)
    rows = outputs[0][0].float()  # (N, 5 + classes)
    center, half = corner + rows[:, :2] * stride, rows[:, 2:4].exp() * stride / 2
    return torch.cat([center - half, center + half], 1), rows[:, 4:5] * rows[:, 5:]


#: Layout to the function that turns the graph's outputs into boxes and scores.
_DECODERS = {"yolox": _decode_yolox}


def _check_image(name: str, rgb: np.ndarray) -> None:
    if not isinstance(rgb, np.ndarray) or rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size:
        came = f"{rgb.dtype} {rgb.shape}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
        raise ValueError(f"`{name}` must be an RGB image, a numpy array (H, W, 3) of uint8, got {came}.")


def _stride(name: str, level: Tensor, size: tuple[int, int]) -> float:
    ratios = {size[0] / level.shape[2], size[1] / level.shape[3]} if level.ndim == 4 and level.numel() else set()
    if len(ratios) != 1:
        raise ValueError(
            f"`features`: {name!r} has shape {tuple(level.shape)}, not a feature map's (1, C, H / stride, W / stride) "
            f"of an input of {size[0]} x {size[1]}. Name another tensor, or give `strides`."
        )
    return ratios.pop()


def _load(path: Path) -> tuple[Any, str]:
    """The model with all its weights, and the SHA-256 of its files."""
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    broken = require("google.protobuf.message", extra="onnx", purpose=_PURPOSE).DecodeError
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
        tensors = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
        places = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        onnx.load_external_data_for_model(model, str(path.parent))
        digest = hashlib.sha256(content)
        for place in sorted(places):
            digest.update((path.parent / place).read_bytes())
    except (OSError, onnx.checker.ValidationError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    except broken as error:
        raise DataError(f"{path} is not an ONNX model ({error}).") from None
    if not model.graph.node:
        raise DataError(f"{path} is not an ONNX model (it holds no graph).")
    return model, digest.hexdigest()


def _check_raw(model: Any, path: Path) -> None:
    # The shapes of raw and decoded output are the same, but sizes become pixels by an exponential.
    if any(node.op_type == "Exp" for node in model.graph.node):
        raise DataError(
            f'{path} already decodes its boxes (it holds an "Exp" node); `layout="yolox"` takes the raw output. '
            "Export it without --decode_in_inference."
        )


def _session(model: Any, features: Sequence[str]) -> Any:
    """The model as onnxruntime runs it, with ``features`` among its outputs."""
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    runtime = require("onnxruntime", extra="onnx", purpose=_PURPOSE)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in features if name not in present)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _input(session: Any, path: Path) -> tuple[str, tuple[int, int]]:
    """Name and ``(height, width)`` of the one input."""
    inputs = session.get_inputs()
    shapes = [f"{found.type} {found.shape}" for found in inputs]
    if len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) == 4:
        batch, channels, height, width = inputs[0].shape  # a name or None where the size is open
        fits = channels == 3 and (batch == 1 or not isinstance(batch, int))
        if fits and isinstance(height, int) and isinstance(width, int):
            return inputs[0].name, (height, width)
    raise DataError(
        f"{path} must have one input, tensor(float) [1, 3, height, width] of fixed height and width, got "
        f"{', '.join(shapes) or 'none'}. Export it so."
    )


def _checked_names(model: Any, features: Sequence[str], path: Path) -> list[str]:
    known = [name for node in model.graph.node for name in node.output]
    for name in features:
        if name not in known:
            raise ValueError(
                f"`features` names {name!r}, which no node of {path} computes.{did_you_mean(name, known)} "
                f"{_some_names(model)}"
            )
    return list(features)


def _yolox_neck(model: Any, path: Path) -> list[str]:
    """Names of the maps between neck and head, finest first.

    The output joins the levels; each level joins box, objectness and class scores, which come out of two towers on one
    stem. So the stem is the last convolution that all parts of a level have in common, and its input is the map.
    """
    nodes = model.graph.node
    producer = {name: index for index, node in enumerate(nodes) for name in node.output}

    def joined(name: str) -> list[str]:
        """The tensors whose concatenation, however rearranged, ``name`` is."""
        while name in producer and nodes[producer[name]].op_type in _RESHAPING:
            name = nodes[producer[name]].input[0]
        node = nodes[producer[name]] if name in producer else None
        return list(node.input) if node is not None and node.op_type == "Concat" else []

    def convolutions(name: str) -> set[int]:
        """The convolutions that ``name`` depends on."""
        seen: set[int] = set()
        waiting = [name]
        while waiting:
            index = producer.get(waiting.pop())
            if index is not None and index not in seen:
                seen.add(index)
                waiting.extend(nodes[index].input)
        return {index for index in seen if nodes[index].op_type == "Conv"}

    levels = joined(model.graph.output[0].name) if len(model.graph.output) == 1 else []
    parts = [[convolutions(part) for part in joined(level)] for level in levels]
    shared = [set.intersection(*level) if level else set() for level in parts]
    if len(levels) != len(_YOLOX_STRIDES) or not all(shared):
        raise ValueError(
            f"The feature maps of {path} cannot be found: its output does not join the {len(_YOLOX_STRIDES)} levels of "
            f"a YOLOX head. Name them with `features`, finest first. {_some_names(model)}"
        )
    return [nodes[max(level)].input[0] for level in shared]


def _some_names(model: Any) -> str:
    """The latest maps of the three smallest sizes that convolutions read: where feature maps are usually found."""
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    read = {node.input[0] for node in model.graph.node if node.op_type == "Conv"}
    sizes: dict[tuple[int, ...], list[str]] = {}
    for value in onnx.shape_inference.infer_shapes(model).graph.value_info:
        shape = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        if value.name in read and len(shape) == 4 and all(shape[1:]):
            sizes.setdefault(shape[2:], []).append(f"{value.name!r} ({shape[1]} channels)")
    lists = [f"{size[0]} x {size[1]}: {', '.join(sizes[size][-16:])}" for size in sorted(sizes, reverse=True)[-3:]]
    return f"Maps that convolutions read, the latest of each size: {'; '.join(lists) or 'none'}."
