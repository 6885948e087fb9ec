"""Reading and searching the graph of an ONNX file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from iou_refiner import DataError
from iou_refiner.checks import did_you_mean, require

PURPOSE = "An ONNX detector"
_YOLOX_LEVELS = 3
_MOST_BYTES = 2**31 - 1  # of a protobuf message
# Operators that only rearrange values, passed through on the way from the output back to the head.
_RESHAPING = {"Flatten", "Identity", "Reshape", "Transpose"}


def load(path: Path) -> tuple[Any, str]:
    """The model with all its weights, and the SHA-256 of its files.

    Raises:
        DataError: a file is missing, unreadable, not beside the graph, too large or no ONNX model.
    """
    onnx = require("onnx", extra="onnx", purpose=PURPOSE)
    broken = require("google.protobuf.message", extra="onnx", purpose=PURPOSE).DecodeError
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size <= _MOST_BYTES):
            raise DataError(f"{path} is not an ONNX model (not a file of at most 2 GB).")
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
        places = _check_places(model, path)
        onnx.load_external_data_for_model(model, str(path.parent))
        digest = hashlib.sha256(content)
        for place in places:
            digest.update((path.parent / place).read_bytes())
    except broken as error:
        raise DataError(f"{path} is not an ONNX model ({error}).") from None
    except DataError:
        raise
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    if not model.graph.node:
        raise DataError(f"{path} is not an ONNX model (it holds no graph).")
    return model, digest.hexdigest()


def _check_places(model: Any, path: Path) -> list[str]:
    """The files in which tensors of the model keep their values, sorted.

    Raises:
        DataError: one lies outside the folder of ``path``, or they hold more than a model can.
    """
    external = require("onnx", extra="onnx", purpose=PURPOSE).TensorProto.EXTERNAL
    folder, places, size = path.parent.resolve(), set(), 0
    for tensor in _tensors(model):
        if tensor.data_location != external:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        place = told.get("location", "")
        file = (folder / place).resolve()
        if not place or PureWindowsPath(place).is_absolute() or not file.is_relative_to(folder):
            raise DataError(
                f"{path}: the values of the tensor {tensor.name!r} lie in {place!r}, outside the folder of the graph. "
                "Put them beside it and save it again: onnx.save(model, path, save_as_external_data=True)."
            )
        if not file.is_file():
            raise DataError(f"{path} cannot be read (no file {place!r} beside it, which holds {tensor.name!r}).")
        size += int(told.get("length") or file.stat().st_size)
        places.add(place)
    if size > _MOST_BYTES:
        raise DataError(f"{path} cannot be read (its tensors hold {size:,} bytes, a model at most 2 GB).")
    return sorted(places)


def _tensors(part: Any) -> Iterator[Any]:
    """All tensors of a model, with those in the graphs, attributes and functions inside it."""
    if part.DESCRIPTOR.name == "TensorProto":
        yield part
        return
    for field, value in part.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(inner)


def check_raw(model: Any, path: Path) -> None:
    """Raise DataError if the graph decodes YOLOX's boxes itself."""
    # The shapes of raw and decoded output are the same, but sizes become pixels by an exponential.
    if operators(model, "Exp"):
        raise DataError(
            f'{path} already decodes its boxes (it holds an "Exp" node), the layout "yolox" takes the raw output. '
            'Export it without --decode_in_inference, or say `box_format="cxcywh"`.'
        )


def check_name(argument: str, name: str, model: Any, path: Path) -> None:
    """Raise ValueError unless a node of the graph computes the tensor ``name``."""
    known = [output for node in model.graph.node for output in node.output]
    if name not in known:
        outputs = ", ".join(repr(output.name) for output in model.graph.output)
        raise ValueError(
            f"`{argument}` names {name!r}, which no node of {path} computes.{did_you_mean(name, known)} "
            f"Its outputs: {outputs}. {_some_maps(model)}"
        )


def upstream(model: Any, name: str) -> set[int]:
    """Indices of the nodes that the tensor ``name`` depends on."""
    producer = _producers(model)
    visited: set[int] = set()
    waiting = [name]
    while waiting:
        index = producer.get(waiting.pop())
        if index is not None and index not in visited:
            visited.add(index)
            waiting.extend(model.graph.node[index].input)
    return visited


def operators(model: Any, kind: str) -> set[int]:
    """Indices of the nodes of one kind, such as ``"Conv"``."""
    return {index for index, node in enumerate(model.graph.node) if node.op_type == kind}


def yolox_neck(model: Any, path: Path) -> list[str]:
    """Names of the maps between neck and head of a YOLOX graph, finest first.

    The output joins the levels; each level joins box, objectness and class scores, which come out of two towers on one
    stem. So the stem is the last convolution that all parts of a level have in common, and its input is the map.

    Raises:
        ValueError: the graph has no such head.
    """
    nodes, producer, convolutions = model.graph.node, _producers(model), operators(model, "Conv")

    def joined(name: str) -> list[str]:
        """The tensors whose concatenation, however rearranged, ``name`` is."""
        while name in producer and nodes[producer[name]].op_type in _RESHAPING:
            name = nodes[producer[name]].input[0]
        node = nodes[producer[name]] if name in producer else None
        return list(node.input) if node is not None and node.op_type == "Concat" else []

    levels = joined(model.graph.output[0].name) if len(model.graph.output) == 1 else []
    parts = [[upstream(model, part) & convolutions for part in joined(level)] for level in levels]
    shared = [set.intersection(*level) if level else set() for level in parts]
    if len(levels) != _YOLOX_LEVELS or not all(shared):
        raise ValueError(
            f"The feature maps of {path} cannot be found: its output does not join the {_YOLOX_LEVELS} levels of a "
            f"YOLOX head. Name them with `features`, finest first. {_some_maps(model)}"
        )
    return [nodes[max(level)].input[0] for level in shared]


def _producers(model: Any) -> dict[str, int]:
    return {name: index for index, node in enumerate(model.graph.node) for name in node.output}


def _some_maps(model: Any) -> str:
    """The latest maps of the three smallest sizes that convolutions read: feature maps are usually among them."""
    onnx = require("onnx", extra="onnx", purpose=PURPOSE)
    read = {node.input[0] for node in model.graph.node if node.op_type == "Conv"}
    sizes: dict[tuple[int, ...], list[str]] = {}
    try:
        values = onnx.shape_inference.infer_shapes(model).graph.value_info
    except onnx.shape_inference.InferenceError:  # of an operator that nobody knows
        values = []
    for value in values:
        shape = tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        if value.name in read and len(shape) == 4 and all(shape[1:]):
            sizes.setdefault(shape[2:], []).append(f"{value.name!r} ({shape[1]} channels)")
    lists = [f"{size[0]} x {size[1]}: {', '.join(sizes[size][-16:])}" for size in sorted(sizes, reverse=True)[-3:]]
    return f"Maps that convolutions read, the latest of each size: {'; '.join(lists) or 'none'}."
