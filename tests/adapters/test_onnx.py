"""What is particular to ONNX detectors: decoding, the maps inside a graph, and graphs that do not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torchvision import ops

from iou_refiner import DataError
from iou_refiner.adapters.onnx import OnnxAdapter, OnnxLayout
from iou_refiner.adapters.onnx.layouts import LAYOUTS
from tests.adapters.case import assert_same, example, keep_all, noise, photographs
from tests.adapters.onnx_graphs import tiny_detr, tiny_suppressed, tiny_yolov8, tiny_yolox
from tests.kit.needs import needs_shared

MAPS = ("map8", "map16", "map32")


@pytest.fixture(scope="module")
def yolox_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(tiny_yolox(), path)
    return path


def saved(model: Any, folder: Path, name: str = "some.onnx") -> Path:
    onnx.save(model, folder / name)
    return folder / name


def decoded_cell_by_cell(output: np.ndarray, size: tuple[int, int], threshold: float) -> list[tuple[Any, ...]]:
    """(score, label, x1, y1, x2, y2) of each box and class above the threshold, by falling score; clipped."""
    rows, row = [], 0
    for stride in (8, 16, 32):
        for y in range(size[0] // stride):
            for x in range(size[1] // stride):
                dx, dy, log_w, log_h, objectness, *classes = output[0, row].astype(float)
                row += 1
                cx, cy, w, h = (x + dx) * stride, (y + dy) * stride, np.exp(log_w) * stride, np.exp(log_h) * stride
                x1, y1 = max(cx - w / 2, 0), max(cy - h / 2, 0)
                x2, y2 = min(cx + w / 2, size[1]), min(cy + h / 2, size[0])
                for label, score in enumerate(classes):
                    if score * objectness > threshold and x1 < x2 and y1 < y2:
                        rows.append((score * objectness, label, x1, y1, x2, y2))
    assert row == output.shape[1]
    return sorted(rows, reverse=True)


def test_boxes_are_those_of_a_decoder_written_cell_by_cell(yolox_file: Path) -> None:
    """The image has the size of the input, so that nothing but decoding and clipping lies between."""
    (rgb,) = noise((64, 96))
    session = onnxruntime.InferenceSession(yolox_file.read_bytes())
    (output,) = session.run(None, {"images": rgb[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32)})
    expected = decoded_cell_by_cell(output, (64, 96), 0.2)
    (result,) = OnnxAdapter(yolox_file, score_threshold=0.2).run(keep_all, [rgb])
    assert len(result["boxes"]) == len(expected) > 20
    order = result["scores"].argsort(descending=True)
    torch.testing.assert_close(result["scores"][order], torch.tensor([row[0] for row in expected]).float())
    assert result["labels"][order].tolist() == [row[1] for row in expected]
    boxes = torch.tensor([row[2:] for row in expected]).float()
    torch.testing.assert_close(result["boxes"][order], boxes, atol=1e-3, rtol=0)


def test_own_suppression_is_greedy_nms_per_class(yolox_file: Path) -> None:
    adapter = OnnxAdapter(yolox_file, nms_threshold=0.4)
    _, (candidates,), _ = adapter.extract(noise((64, 96)))
    keep = ops.batched_nms(candidates.boxes, candidates.scores, candidates.labels, 0.4)
    (result,) = adapter(noise((64, 96)))
    assert 2 <= len(keep) < len(candidates)
    assert torch.equal(result["boxes"], candidates.boxes[keep])
    assert torch.equal(result["scores"], candidates.scores[keep])


def test_maps_are_those_under_the_head(yolox_file: Path) -> None:
    adapter = OnnxAdapter(yolox_file)
    assert adapter.features == ["map8", "map16", "map32"]
    assert adapter.strides == (8, 16, 32)
    features, _, _ = adapter.extract(noise((64, 96), (10, 10)))
    assert [level.shape for level in features.levels] == [(2, 6, 8, 12), (2, 6, 4, 6), (2, 6, 2, 3)]
    assert features.image_sizes == ((64, 96), (64, 64))


def test_batch_is_its_images_one_by_one(yolox_file: Path) -> None:
    adapter, images = OnnxAdapter(yolox_file), noise((50, 90), (200, 120))
    assert_same(adapter(images), adapter(images[:1]) + adapter(images[1:]))
    assert adapter([]) == []
    features, candidates, transforms = adapter.extract([])
    assert len(features) == len(candidates) == len(transforms) == 0


def test_leaves_the_file_and_tells_it_apart(yolox_file: Path, tmp_path: Path) -> None:
    content = yolox_file.read_bytes()
    adapter = OnnxAdapter.from_name(str(yolox_file))
    adapter(noise((64, 96)))
    assert yolox_file.read_bytes() == content
    assert list(yolox_file.parent.iterdir()) == [yolox_file]
    assert adapter.fingerprint() == hashlib.sha256(content).hexdigest()
    chosen = [OnnxAdapter(yolox_file, features=names).fingerprint() for names in (["map8"], ["map16"])]
    assert len({adapter.fingerprint(), *chosen}) == 3


def test_weights_beside_the_file(yolox_file: Path, tmp_path: Path) -> None:
    path, images = tmp_path / "split.onnx", noise((64, 96))
    onnx.save(tiny_yolox(), path, save_as_external_data=True, location="split.data", size_threshold=0)
    adapter = OnnxAdapter(path)
    assert_same(adapter(images), OnnxAdapter(yolox_file)(images))
    weights = bytearray((tmp_path / "split.data").read_bytes())
    weights[3] ^= 1
    (tmp_path / "split.data").write_bytes(weights)
    assert OnnxAdapter(path).fingerprint() != adapter.fingerprint()
    (tmp_path / "split.data").unlink()
    with pytest.raises(DataError, match=r"split\.onnx cannot be read"):
        OnnxAdapter(path)


def test_non_finite_output_gives_no_box(tmp_path: Path) -> None:
    model = tiny_yolox()
    model.graph.node[-1].CopyFrom(helper.make_node("Div", ["raw", "zero"], ["output"]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    onnx.save(model, tmp_path / "broken.onnx")
    adapter = OnnxAdapter(tmp_path / "broken.onnx", features=["map8"])
    (result,) = adapter(noise((64, 96)))
    assert torch.isfinite(result["boxes"]).all()


class TestRefuses:
    def test_what_is_no_path(self) -> None:
        with pytest.raises(TypeError, match="takes the path of an ONNX file, got ModelProto"):
            OnnxAdapter(tiny_yolox())

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere\.onnx cannot be read"):
            OnnxAdapter(tmp_path / "nowhere.onnx")
        (tmp_path / "text.onnx").write_text("this is no model")
        (tmp_path / "empty.onnx").touch()
        for name in ("text", "empty"):
            with pytest.raises(DataError, match=rf"{name}\.onnx is not an ONNX model"):
                OnnxAdapter(tmp_path / f"{name}.onnx")

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"last": "Exp"}, r"already decodes its boxes.*without --decode_in_inference"),
            ({"size": ("height", 96)}, r"leaves the size of its input open\. Give `input_size`"),
            ({"last": "Transpose"}, r"'output' is not \(1, N, 5 or more\); it returns 'output' \(7, 126, 1\)"),
        ],
    )
    def test_graphs_of_another_layout(self, tmp_path: Path, how: dict[str, Any], message: str) -> None:
        onnx.save(tiny_yolox(**how), tmp_path / "other.onnx")
        with pytest.raises(DataError, match=message):
            OnnxAdapter(tmp_path / "other.onnx")

    def test_graph_without_a_yolox_head(self, tmp_path: Path) -> None:
        onnx.save(tiny_yolox(last="Abs"), tmp_path / "other.onnx")
        message = r"feature maps of .* cannot be found.*with `features`.*8 x 12: 'map8' \(6 channels\)"
        with pytest.raises(ValueError, match=message):
            OnnxAdapter(tmp_path / "other.onnx")
        assert OnnxAdapter(tmp_path / "other.onnx", features=["map8", "map32"]).strides == (8, 32)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (["map9"], r"names 'map9', which no node of .* computes\. Did you mean 'map8'\?.*'map16'"),
            (["raw"], r"`features`: 'raw' has shape \(1, 126, 7\)"),
            (["map16", "map8"], r"from fine to coarse, got strides \(16\.0, 8\.0\)"),
            ([], r"`strides` must give one stride per level: got 0 levels"),
        ],
    )
    def test_features_that_do_not_fit(self, yolox_file: Path, features: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            OnnxAdapter(yolox_file, features=features)

    def test_options_out_of_range(self, yolox_file: Path) -> None:
        with pytest.raises(ValueError, match=r"`layout` must be one of 'yolox', .*, got 'yolo'\. Did you mean"):
            OnnxAdapter(yolox_file, layout="yolo")
        with pytest.raises(ValueError, match=r"`setting` must be .*, got 'feature'\. Did you mean 'features'\?"):
            OnnxAdapter(yolox_file, feature=["map8"])
        with pytest.raises(ValueError, match=r"`score_threshold` must lie in \[0, 1\], got 2"):
            OnnxAdapter(yolox_file, score_threshold=2)
        with pytest.raises(ValueError, match=r"`strides` must give one stride per level: got 3 levels, 1 strides"):
            OnnxAdapter(yolox_file, strides=[8])

    def test_images_of_another_form(self, yolox_file: Path) -> None:
        adapter = OnnxAdapter(yolox_file)
        with pytest.raises(ValueError, match=r"`images\[0\]` must be an RGB image.*got uint8 \(96, 3\)"):
            adapter(noise((64, 96))[0])
        with pytest.raises(ValueError, match=r"`images\[0\]` must be an RGB image.*got Tensor"):
            adapter([torch.zeros(3, 64, 96)])
        with pytest.raises(ValueError, match=r"`rgb` must be an RGB image.*got float64 \(2, 2, 3\)"):
            adapter.prepare(np.zeros((2, 2, 3)))
        with pytest.raises(ValueError, match=r"got uint8 \(0, 5, 3\)"):
            adapter.prepare(np.zeros((0, 5, 3), np.uint8))

    def test_another_device(self, yolox_file: Path) -> None:
        with pytest.raises(ValueError, match=r"`device` must be 'cpu' for an ONNX detector.*got 'cuda:0'"):
            OnnxAdapter(yolox_file).to("cuda:0")


class TestOtherExports:
    def test_a_layout_is_read_from_beside_the_file(self, tmp_path: Path) -> None:
        path = saved(tiny_yolov8(), tmp_path)
        (tmp_path / "some.layout.json").write_text('{"layout": "yolov8", "features": ["map8", "map16"], "scale": 1}')
        adapter = OnnxAdapter.from_name(str(path))
        assert adapter.layout == LAYOUTS["yolov8"].replace(features=MAPS[:2], scale=1.0)
        assert adapter.strides == (8, 16)

    def test_tensors_from_before_the_nms_of_the_graph(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        path, images = saved(tiny_suppressed(), tmp_path), noise((64, 96))
        layout = OnnxLayout(features=MAPS, score_threshold=0.6)
        _, (candidates,), _ = OnnxAdapter(path, layout, boxes="all_boxes", scores="all_scores").extract(images)
        OnnxAdapter(path, layout, boxes="all_boxes", scores="best_scores", labels="best_labels")
        assert not recwarn.list
        with pytest.warns(UserWarning, match="gives 'boxes' after its own NMS: there is nothing left to suppress"):
            after = OnnxAdapter(path, layout, boxes="boxes", scores="scores", labels="labels")
        _, (final,), _ = after.extract(images)
        assert 2 <= len(final) < len(candidates)
        before, left = (
            {tuple(row) for row in torch.cat([each.boxes, each.scores[:, None], each.labels[:, None]], 1).tolist()}
            for each in (candidates, final)
        )
        assert before > left

    def test_images_of_their_own_size(self, tmp_path: Path) -> None:
        """A graph that takes any size, and nothing that resizes: each image alone gives what it gives in a batch."""
        path, images = saved(tiny_detr(("h", "w")), tmp_path), noise((64, 96), (80, 70))
        adapter = OnnxAdapter(path, "detr", features=MAPS, fit="none", input_size=(64, 64))
        features, candidates, transforms = adapter.extract(images)
        assert features.image_sizes == ((64, 96), (80, 70))
        assert [transform.scale for transform in transforms] == [(1, 1), (1, 1)]
        assert [level.shape for level in features.levels] == [(2, 6, 10, 12), (2, 6, 5, 6), (2, 6, 2, 3)]
        alone, _, _ = adapter.extract(images[1:])
        for level, one in zip(features.levels, alone.levels, strict=True):
            assert torch.equal(level[1:, :, : one.shape[2], : one.shape[3]], one)
            assert not level[1, :, one.shape[2] :].any()
            assert not level[1, :, :, one.shape[3] :].any()
        assert candidates[1].boxes[:, 2].max() <= 70 < candidates[0].boxes[:, 2].max()

    def test_a_graph_that_resizes_images_itself(self, tmp_path: Path) -> None:
        adapter = OnnxAdapter(
            saved(tiny_detr(("h", "w"), resized=True), tmp_path),
            "detr",
            features=MAPS,
            fit="none",
            input_size=(128, 192),
        )
        assert adapter.strides == (16, 32, 64)
        with pytest.raises(
            ValueError, match=r"'map8' has shape \(1, 6, 8, 12\) .* 300 x 500, .* resizes images itself"
        ):
            adapter.extract(noise((300, 500)))

    def test_sizes_that_contradict_the_graph(self, tmp_path: Path) -> None:
        path = saved(tiny_detr(), tmp_path)
        with pytest.raises(DataError, match=r"`input_size` is \(32, 32\), .* takes \(64, 96\) alone"):
            OnnxAdapter(path, "detr", features=MAPS, input_size=(32, 32))
        adapter = OnnxAdapter(path, "detr", features=MAPS, fit="none")
        with pytest.raises(ValueError, match=r"`images\[1\]` must have 64 x 96 pixels.*got 50 x 90"):
            adapter.extract(noise((64, 96), (50, 90)))

    def test_categories(self, tmp_path: Path) -> None:
        path = saved(tiny_detr(), tmp_path)
        assert OnnxAdapter(path, "detr", features=MAPS).category_ids is None
        assert OnnxAdapter(path, "detr", features=MAPS, category_ids=[5, 7, 9]).category_ids == {0: 5, 1: 7, 2: 9}
        with pytest.raises(ValueError, match=r"`category_ids` must name the 3 classes .*, got 2 ids"):
            OnnxAdapter(path, "detr", features=MAPS, category_ids=[5, 7])

    @pytest.mark.parametrize(
        ("layout", "error", "message"),
        [
            ({}, DataError, r"returns 'logits', 'pred_boxes': say which holds the boxes with `boxes`"),
            (
                {"boxes": "pred_boxs"},
                ValueError,
                r"`boxes` names 'pred_boxs', .*Did you mean 'pred_boxes'.*Its outputs",
            ),
            ({"boxes": "pred_boxes", "scores": "logit"}, ValueError, r"`scores` names 'logit', which no node"),
            ({"boxes": "pred_boxes", "scores": "logits"}, ValueError, r"feature maps of .* cannot be found"),
        ],
    )
    def test_names_that_are_missing(
        self, tmp_path: Path, layout: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            OnnxAdapter(saved(tiny_detr(), tmp_path), OnnxLayout(**layout))

    def test_another_input(self, tmp_path: Path) -> None:
        model = tiny_detr()
        model.graph.input.append(helper.make_tensor_value_info("sizes", onnx.TensorProto.INT64, [1, 2]))
        message = r"one input, .* got tensor\(float\) \[1, 3, 64, 96\], tensor\(int64\) \[1, 2\]"
        with pytest.raises(DataError, match=message):
            OnnxAdapter(saved(model, tmp_path), "detr", features=MAPS)

    def test_settings_tell_how_images_are_prepared(self, yolox_file: Path) -> None:
        """What a feature cache is known by: nothing that leaves maps and candidates as they are."""
        told = {OnnxAdapter(yolox_file, **changes).settings() for changes in ({}, {"nms_threshold": 0.3})}
        assert told == {"features=['map8', 'map16', 'map32'] score_threshold=0.01"}
        assert "channels='RGB'" in OnnxAdapter(yolox_file, channels="RGB").settings()

    def test_twin_suppresses_as_told(self, yolox_file: Path) -> None:
        adapter, images = OnnxAdapter(yolox_file), noise((64, 96))
        twin = adapter.twin(lambda features, candidates: [image[:3] for image in candidates])
        assert [len(result["boxes"]) for result in twin(images)] == [3]
        assert len(adapter(images)[0]["boxes"]) > 3


def test_trained_yolox_has_the_categories_of_coco_and_detects_people() -> None:
    adapter, images, data = example("yolox"), photographs(), needs_shared() / "data"
    official = json.loads((data / "coco-80" / "instances_test.json").read_text())["categories"]
    assert adapter.category_ids == dict(enumerate(sorted(category["id"] for category in official)))
    truth = json.loads((data / "coco-person" / "instances_val.json").read_text())
    wide = next(image for image in truth["images"] if image["width"] > image["height"])
    largest = max((a for a in truth["annotations"] if a["image_id"] == wide["id"]), key=lambda a: a["area"])
    x, y, w, h = largest["bbox"]
    (result,) = adapter(images[:1])
    people = result["boxes"][(result["labels"] == 0) & (result["scores"] > 0.3)]
    assert ops.box_iou(people, torch.tensor([[x, y, x + w, y + h]])).max() > 0.6
