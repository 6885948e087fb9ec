"""An exported network as onnxruntime runs it: pixels in, the named tensors out.

A graph hides its inner tensors but computes them all the same: named as outputs, they come out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iou_refiner import DataError
from iou_refiner.adapters.onnx.graph import PURPOSE
from iou_refiner.adapters.onnx.layouts import MOST_PIXELS, OnnxLayout
from iou_refiner.checks import require


class Network:
    """A graph that returns the tensors ``names`` and computes nothing else.

    Args:
        model: the ONNX model; its outputs are rewritten.
        names: of the tensors to return.
        layout: how images enter.
        path: of the file, for messages.

    Attributes:
        input_size: ``(height, width)`` of the input; where the graph leaves it open, what the layout says.

    Raises:
        DataError: the graph takes something else than one float image, or its size is neither fixed nor given.
    """

    def __init__(self, model: Any, names: Iterable[str], layout: OnnxLayout, path: Path):
        onnx = require("onnx", extra="onnx", purpose=PURPOSE)
        runtime = require("onnxruntime", extra="onnx", purpose=PURPOSE)
        self.names = list(dict.fromkeys(names))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait for the next image by spinning take the cores from torch, which is at work meanwhile.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._path, self._fit = path, layout.fit
        try:
            content = model.SerializeToString()
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's have no class in common
            raise self._refused(error) from None
        self._input, self._batched, fixed = _image_input(self._session, path)
        sides = [side or told for side, told in zip(fixed, layout.input_size or (None, None), strict=True)]
        if None in sides:
            raise DataError(f"{path} leaves the size of its input open. Give `input_size`, (height, width).")
        self.input_size: tuple[int, int] = (int(sides[0]), int(sides[1]))
        if max(self.input_size) > MOST_PIXELS:
            raise DataError(f"{path} takes {self.input_size} pixels, at most {MOST_PIXELS} a side are possible.")
        self._takes_any_size = None in fixed
        if layout.input_size not in (None, self.input_size):
            raise DataError(f"`input_size` is {layout.input_size}, {path} takes {self.input_size} alone. Leave it out.")

    def size_for(self, name: str, rgb: np.ndarray) -> tuple[int, int]:
        """``(height, width)`` of the input for the image ``rgb`` (H, W, 3): its own where nothing resizes it."""
        own = (rgb.shape[0], rgb.shape[1])
        if self._fit != "none":
            return self.input_size
        if own != self.input_size and not self._takes_any_size:
            raise ValueError(
                f"`{name}` must have {self.input_size[0]} x {self.input_size[1]} pixels, since {self._path} takes no "
                f'other size and `fit="none"` resizes nothing, got {own[0]} x {own[1]}. Choose another `fit`.'
            )
        return own

    def __call__(self, pixels: np.ndarray) -> dict[str, Tensor]:
        """All named tensors for one input (1, 3, H, W) float32."""
        try:
            values = self._session.run(self.names, {self._input: pixels if self._batched else pixels[0]})
        except Exception as error:
            raise self._refused(error) from None
        return {name: torch.from_numpy(value) for name, value in zip(self.names, values, strict=True)}

    def _refused(self, error: Exception) -> DataError:
        return DataError(
            f"{self._path} cannot be run ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Operators are onnxruntime's own, on the CPU; libraries of others are not loaded."
        )


def _image_input(session: Any, path: Path) -> tuple[str, bool, tuple[int | None, int | None]]:
    """Name of the one input, whether it has a batch axis, and its ``(height, width)``, None where they are open."""
    inputs = session.get_inputs()
    if len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(inputs[0].shape) in (3, 4):
        # An open size is a name or None.
        *batch, channels, height, width = (side if isinstance(side, int) else None for side in inputs[0].shape)
        if channels in (3, None) and batch in ([], [1], [None]):
            return inputs[0].name, bool(batch), (height, width)
    shapes = ", ".join(f"{one.type} {one.shape}" for one in inputs)
    raise DataError(
        f"{path} must have one input, tensor(float) [1, 3, height, width] or [3, height, width], got "
        f"{shapes or 'none'}. Export it so."
    )
