"""Small ONNX detectors with seeded random weights, one for each form in which exported detectors return boxes."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

STRIDES = (8, 16, 32)


class GraphBuilder:
    """Adds nodes with seeded random weights to an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(3)

    def constant(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def node(self, kind: str, inputs: list[str], name: str | None = None, **attributes: Any) -> str:
        name = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def conv(self, source: str, channels: tuple[int, int], size: int = 1, bias: float = 0.0, scale: float = 1.0) -> str:
        spread = scale / (channels[0] * size**2) ** 0.5
        weight = self.random.normal(scale=spread, size=(channels[1], channels[0], size, size))
        shift = np.full(channels[1], bias)
        names = [self.constant(value.astype(np.float32)) for value in (weight, shift)]
        return self.node("Conv", [source, *names], kernel_shape=[size, size], strides=[size, size])

    def silu(self, source: str, name: str | None = None) -> str:
        return self.node("Mul", [source, self.node("Sigmoid", [source])], name)

    def reshaped(self, source: str, *shape: int) -> str:
        return self.node("Reshape", [source, self.constant(np.array(shape))])

    def joined(self, sources: list[str], name: str | None = None, *, axis: int) -> str:
        return self.node("Concat", sources, name, axis=axis)


def model_of(graph: GraphBuilder, shape: list[Any], *outputs: str) -> Any:
    """The model with one image input of ``shape`` called "images" and these outputs."""
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)]
    named = [ValueInfoProto(name=name) for name in outputs]
    made = helper.make_graph(graph.nodes, "tiny", inputs, named, graph.weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def tiny_yolox(size: tuple[Any, Any] = (64, 96), *, last: str = "Identity") -> Any:
    """A YOLOX-like ONNX model: strides 8, 16, 32, two classes; the head's stems read map8, map16, map32.

    ``last`` is the operator between the rows and the output.
    """
    graph = GraphBuilder()
    source, channels, levels = "images", 3, []
    for stride in (8, 16, 32):
        # Input is 0 to 255: the first weights bring it to about 1.
        raw = graph.conv(source, (channels, 6), 8 if stride == 8 else 2, scale=0.01 if stride == 8 else 2)
        source, channels = graph.silu(raw, f"map{stride}"), 6
        stem = graph.silu(graph.conv(source, (6, 8), scale=2))
        class_tower, box_tower = graph.silu(graph.conv(stem, (8, 8))), graph.silu(graph.conv(stem, (8, 8)))
        parts = [
            graph.conv(box_tower, (8, 4), bias=0.5, scale=0.3),
            graph.node("Sigmoid", [graph.conv(box_tower, (8, 1), scale=3)]),
            graph.node("Sigmoid", [graph.conv(class_tower, (8, 2), scale=3)]),
        ]
        level = graph.node("Concat", parts, axis=1)
        levels.append(graph.node("Reshape", [level, graph.constant(np.array([1, 7, -1]))]))
    rows = graph.node("Transpose", [graph.node("Concat", levels, axis=2)], "raw", perm=[0, 2, 1])
    graph.node(last, [rows], "output")
    return model_of(graph, [1, 3, *size], "output")


def trunk(graph: GraphBuilder, source: str) -> list[str]:
    """Maps "map8", "map16" and "map32" of six channels; the input is of about 1."""
    maps, channels = [], 3
    for stride in STRIDES:
        raw = graph.conv(source, (channels, 6), 8 if stride == 8 else 2, scale=2)
        source, channels = graph.silu(raw, f"map{stride}"), 6
        maps.append(source)
    return maps


def predicted(graph: GraphBuilder, maps: list[str], channels: int, *, scale: float, bias: float = 0.0) -> str:
    """What one convolution predicts in every cell of the maps, (1, channels, N)."""
    cells = [graph.conv(level, (6, channels), bias=bias, scale=scale) for level in maps]
    return graph.joined([graph.reshaped(level, 1, channels, -1) for level in cells], axis=2)


def corners(graph: GraphBuilder, maps: list[str], size: tuple[int, int]) -> tuple[str, str]:
    """Top left and bottom right (1, 2, N) in pixels, each predicted as a distance from the center of a cell."""
    centers, strides = [], []
    for stride in STRIDES:
        rows, columns = np.mgrid[: size[0] // stride, : size[1] // stride]
        centers.append((np.stack([columns.ravel(), rows.ravel()]) + 0.5) * stride)
        strides.append(np.full(rows.size, stride))
    center, stride = (graph.constant(np.concatenate(v, -1)[None].astype(np.float32)) for v in (centers, strides))
    away = [
        graph.node("Mul", [graph.node("Relu", [predicted(graph, maps, 2, scale=1, bias=1.0)]), stride]) for _ in "ab"
    ]
    return graph.node("Sub", [center, away[0]]), graph.node("Add", [center, away[1]])


def tiny_yolov8(size: tuple[int, int] = (64, 96)) -> Any:
    """As YOLOv8 is exported: "output0" (1, 4 + 3, N), center and size in pixels, then scores after their sigmoid."""
    graph = GraphBuilder()
    maps = trunk(graph, "images")
    first, second = corners(graph, maps, size)
    half = graph.constant(np.array(0.5, np.float32))
    center = graph.node("Mul", [graph.node("Add", [first, second]), half])
    scores = graph.node("Sigmoid", [predicted(graph, maps, 3, scale=4)])
    graph.joined([center, graph.node("Sub", [second, first]), scores], "output0", axis=1)
    return model_of(graph, [1, 3, *size], "output0")


def tiny_detr(size: tuple[Any, Any] = (64, 96), *, resized: bool = False) -> Any:
    """As DETR is exported: "logits" (1, Q, 3 + 1) and "pred_boxes" (1, Q, 4), center and size, fractions of the input.

    It takes any size. ``resized``: the graph itself brings its input to 64 x 96.
    """
    graph, source = GraphBuilder(), "images"
    if resized:
        target = graph.constant(np.array([1, 3, 64, 96]))
        source = graph.node("Resize", ["images", "", "", target], mode="linear")
    maps = trunk(graph, source)
    graph.node("Transpose", [predicted(graph, maps, 4, scale=4)], "logits", perm=[0, 2, 1])
    boxes = graph.node("Sigmoid", [predicted(graph, maps, 4, scale=2)])
    graph.node("Transpose", [boxes], "pred_boxes", perm=[0, 2, 1])
    return model_of(graph, [1, 3, *size], "logits", "pred_boxes")


def tiny_suppressed(size: tuple[int, int] = (64, 96)) -> Any:
    """As torchvision exports: an input (3, H, W), and "boxes" (M, 4), "scores" and "labels" (M,) after an NMS at 0.5.

    What goes into the NMS is called "all_boxes" (N, 4) and "all_scores" (N, 3); the best of the latter, "best_scores"
    and "best_labels" (N,).
    """
    graph = GraphBuilder()
    maps = trunk(graph, graph.node("Unsqueeze", ["images", graph.constant(np.array([0]))]))
    sides = graph.joined(list(corners(graph, maps, size)), axis=1)
    scores = graph.node("Sigmoid", [predicted(graph, maps, 3, scale=4)])
    boxes = graph.reshaped(graph.node("Transpose", [sides], perm=[0, 2, 1]), -1, 4)
    graph.node("Identity", [boxes], "all_boxes")
    graph.node("Transpose", [graph.reshaped(scores, 3, -1)], "all_scores", perm=[1, 0])
    graph.node("ReduceMax", ["all_scores"], "best_scores", axes=[1], keepdims=0)
    graph.node("ArgMax", ["all_scores"], "best_labels", axis=1, keepdims=0)
    limits = [graph.constant(np.array(limit, kind)) for limit, kind in ((99, np.int64), (0.5, np.float32))]
    threshold = graph.constant(np.array([0.6], np.float32))
    keep = graph.node("NonMaxSuppression", [graph.reshaped("all_boxes", 1, -1, 4), scores, *limits, threshold])
    label, row = (graph.node("Gather", [keep, graph.constant(np.array(column))], axis=1) for column in (1, 2))
    graph.node("Identity", [label], "labels")
    graph.node("Gather", ["all_boxes", row], "boxes", axis=0)
    cells = graph.joined([graph.reshaped(index, -1, 1) for index in (row, label)], axis=1)
    graph.node("GatherND", ["all_scores", cells], "scores")
    return model_of(graph, [3, *size], "boxes", "labels", "scores")
