"""What OnnxLayout says: how an image enters, how boxes and scores are read, and which files hold a layout."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iou_refiner import DataError
from iou_refiner.adapters.onnx import OnnxLayout
from iou_refiner.adapters.onnx.boxes import read_boxes
from iou_refiner.adapters.onnx.images import place
from iou_refiner.adapters.onnx.layouts import LAYOUTS

MAPS = ("map8", "map16", "map32")


class TestPlace:
    @pytest.mark.parametrize("fit", ["letterbox", "letterbox-center", "squash"])
    @settings(deadline=None, max_examples=20)
    @given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 200), st.integers(32, 200))
    def test_the_image_is_where_its_transform_says(
        self, fit: str, height: int, width: int, net_height: int, net_width: int
    ) -> None:
        """A white image on padding of 114: all white is the image, and its transform gives its corners."""
        layout = OnnxLayout(fit=fit, scale=1.0)
        pixels, reach, transform = place(np.full((height, width, 3), 255, np.uint8), layout, (net_height, net_width))
        assert pixels.shape == (1, 3, net_height, net_width)
        box = torch.tensor([[0.0, 0, width, height]])
        there = transform.to_network(box)
        torch.testing.assert_close(transform.to_image(there), box, atol=1e-3, rtol=0)
        torch.testing.assert_close(there[0, 2:], torch.tensor(reach[::-1]).float(), atol=1e-3, rtol=0)
        x1, y1, x2, y2 = there.round().int()[0].tolist()
        assert (x2 - x1 == net_width) or (y2 - y1 == net_height)
        assert (abs(pixels[:, :, y1:y2, x1:x2] - 255) < 1e-3).all()
        assert (pixels == 114).sum() == 3 * (net_width * net_height - (x2 - x1) * (y2 - y1))
        margins = np.array([x1, y1, net_width - x2, net_height - y2])
        centered = margins[:2] - margins[2:] if fit == "letterbox-center" else margins[:2]
        assert set(centered.tolist()) <= {0, -1}

    def test_a_rectangle_is_drawn_where_its_transform_says(self) -> None:
        image = np.zeros((300, 500, 3), np.uint8)
        image[60:180, 100:350] = (255, 0, 0)
        pixels, _, transform = place(image, LAYOUTS["yolox"], (416, 416))
        blue, green, red = pixels[0]
        assert not blue[:240].any()  # the picture itself; the padding below is grey
        assert not green[:240].any()
        rows, columns = np.nonzero(red[: round(300 * 416 / 500)] > 127)
        drawn = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
        expected = transform.to_network(torch.tensor([[100.0, 60, 350, 180]]))
        torch.testing.assert_close(drawn, expected, atol=0.75, rtol=0)

    def test_colors_are_normalized_in_their_order(self) -> None:
        image = np.full((4, 4, 3), (51, 102, 255), np.uint8)
        layout = OnnxLayout(mean=(0.1, 0.2, 0.3), std=(0.5, 1, 2))
        (red, green, blue), (b, g, r) = (
            place(image, layout.replace(channels=order), (4, 4))[0][0, :, 0, 0] for order in ("RGB", "BGR")
        )
        np.testing.assert_allclose([red, green, blue], [0.2, 0.2, 0.35], atol=1e-6)
        np.testing.assert_allclose([b, g, r], [1.8, 0.2, -0.05], atol=1e-6)


BOX = [16.0, 8, 48, 40]  # xyxy, in an input of 64 x 96
ROWS = torch.tensor([[BOX, [0.0, 0, 96, 64]]])


class TestReadBoxes:
    """One box written in each way a layout can say, read back as it was."""

    @pytest.mark.parametrize(
        ("layout", "row"),
        [
            ({}, BOX),
            ({"box_format": "xywh"}, [16.0, 8, 32, 32]),
            ({"box_format": "cxcywh"}, [32.0, 24, 32, 32]),
            ({"normalized": True}, [16 / 96, 8 / 64, 48 / 96, 40 / 64]),
            ({"box_format": "cxcywh", "normalized": True}, [32 / 96, 24 / 64, 32 / 96, 32 / 64]),
        ],
    )
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("batch", [False, True])
    def test_formats(self, layout: dict[str, Any], row: list[float], transposed: bool, batch: bool) -> None:
        output = torch.tensor([[*row, 0.25, 0.75]])
        output = output.T if transposed else output
        tensors = {"out": output[None] if batch else output}
        boxes, scores, labels = read_boxes(tensors, "out", OnnxLayout(**layout, transposed=transposed), (64, 96))
        torch.testing.assert_close(boxes, torch.tensor([BOX]))
        assert (scores.tolist(), labels.tolist()) == ([[0.25, 0.75]], [[0, 1]])

    @pytest.mark.parametrize(
        ("layout", "values", "expected"),
        [
            ({"activation": "sigmoid"}, [0.0, -1.5], [0.5, 0.182426]),
            ({"activation": "softmax"}, [0.0, 1.0, 2.0], [0.090031, 0.244728]),
            ({"objectness": True}, [0.5, 0.2, 0.8], [0.1, 0.4]),
            ({"objectness": True, "activation": "sigmoid"}, [0.0, 0.0, -1.5], [0.25, 0.091213]),
        ],
    )
    def test_scores(self, layout: dict[str, Any], values: list[float], expected: list[float]) -> None:
        apart = {"boxes": ROWS[:, :1], "logits": torch.tensor([[values]])}
        together = {"boxes": torch.cat([ROWS[:, :1], apart["logits"]], 2)}
        for tensors, name in ((apart, "logits"), (together, None)):
            _, scores, labels = read_boxes(tensors, "boxes", OnnxLayout(**layout, scores=name), (64, 96))
            torch.testing.assert_close(scores, torch.tensor([expected]), atol=1e-6, rtol=0)
            assert labels.tolist() == [[0, 1]]

    def test_one_label_a_box(self) -> None:
        score, label = torch.tensor([0.5, 0.25]), torch.tensor([7, 3])
        apart = {"b": ROWS[0], "s": score, "l": label}
        rows = {"b": torch.cat([ROWS, score[None, :, None], label[None, :, None]], 2)}
        for tensors, names in ((apart, {"scores": "s", "labels": "l"}), (rows, {"labels": "b"})):
            boxes, scores, labels = read_boxes(tensors, "b", OnnxLayout(**names), (64, 96))
            assert torch.equal(boxes, ROWS[0])
            assert (scores.tolist(), labels.tolist()) == ([[0.5], [0.25]], [[7], [3]])

    @pytest.mark.parametrize(
        ("tensors", "layout", "message"),
        [
            ({"b": ROWS}, {}, r"'b' is not \(1, N, 5 or more\); it returns 'b' \(1, 2, 4\)"),
            ({"b": ROWS}, {"transposed": True}, r"'b' is not \(1, 5 or more, N\)"),
            ({"b": ROWS, "s": torch.ones(1, 3, 2)}, {"scores": "s"}, r"2 boxes, scores \(3, 2\), 3 labels"),
            ({"b": ROWS, "s": torch.ones(1, 2, 1)}, {"scores": "s", "objectness": True}, r"scores \(2, 0\)"),
            ({"b": torch.ones(1, 2, 7)}, {"box_format": "yolox"}, "64 x 96 has 126 cells of stride 8, 16 and 32"),
        ],
    )
    def test_refuses_other_shapes(self, tensors: dict[str, Any], layout: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_boxes(tensors, "b", OnnxLayout(**layout), (64, 96))


class TestLayout:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"box_format": "xywb"}, r"`box_format` must be one of .*Did you mean 'xywh'"),
            ({"activation": "tanh"}, "`activation` must be one of"),
            ({"fit": "letterbox-centre"}, "Did you mean 'letterbox-center'"),
            ({"channels": "rgb"}, "`channels` must be one of 'RGB', 'BGR'"),
            ({"mean": (0.5,)}, r"`mean` must hold 3 numbers, got \(0.5,\)"),
            ({"std": (1, 0, 1)}, r"`std\[1\]` must be a finite number above 0"),
            ({"scale": 0}, "`scale` must be"),
            ({"nms_threshold": 2}, "`nms_threshold` must lie in"),
            ({"labels": "l", "objectness": True}, "`labels` goes with one score per box"),
        ],
    )
    def test_refuses(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            OnnxLayout(**values)

    def test_is_read_whole(self, tmp_path: Path) -> None:
        layout = LAYOUTS["detr"].replace(
            features=MAPS, input_size=(64, 96), category_ids=(1, 2, 5), strides=(8, 16, 32)
        )
        (tmp_path / "x.json").write_text(json.dumps(dataclasses.asdict(layout)))
        assert OnnxLayout.read(tmp_path / "x.json") == layout

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"x\.json cannot be read as JSON"),
            ("[1]", r"x\.json must hold a JSON object, .* got list"),
            ('{"layout": "yolo8"}', r'"layout" must be one of yolox, .*got .yolo8.\. Did you mean .yolov8.'),
            ('{"layout": [1]}', r'"layout" must be one of'),
            ('{"box": "b"}', r"a layout has no 'box'\. Did you mean 'boxes'"),
            ('{"scale": "big"}', r"x\.json: Expected `float`, got `str` - at `\$\.scale`"),
            ('{"fit": "stretch"}', r"x\.json: `fit` must be one of"),
        ],
    )
    def test_files_that_hold_no_layout(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=message):
            OnnxLayout.read(tmp_path / "x.json")
