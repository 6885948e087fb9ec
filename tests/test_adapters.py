"""The adapter contract, one class over all adapters, and what is particular to each.

Small detectors with seeded random weights stand in for the families; two trained ones join where they are present.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from iou_refiner import DataError, Detections, FeatureMaps, Frame, IoUPredictor, IoURefiner
from iou_refiner.adapters.onnx import OnnxAdapter, letterbox
from iou_refiner.adapters.torchvision import TorchvisionAdapter
from iou_refiner.boxes import clip_boxes

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("IOU_REFINER_SHARED", ROOT.parent / "shared"))
trained = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no trained detectors: {SHARED} is not there (IOU_REFINER_SHARED names another place)"
)
CHANNELS, CLASSES = 16, 4


# --- detectors -------------------------------------------------------------------------------------------------------


class TinyFPN(nn.Module):
    """Images (N, 3, H, W) to an FPN of strides 4, 8 and 16 (the last pooled, for the RPN alone)."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(8, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU())
        self.fpn = ops.FeaturePyramidNetwork([8, 12], CHANNELS, ops.feature_pyramid_network.LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(images)
        maps: dict[str, Tensor] = self.fpn(OrderedDict([("0", fine), ("1", self.coarse(fine))]))
        return maps


def extra_heads(kind: str) -> dict[str, Any]:
    """What Mask and Keypoint R-CNN have beside the box head."""
    pool = ops.MultiScaleRoIAlign(["0", "1"], 14, 2)
    if kind == "mask":
        head, predictor = MaskRCNNHeads(CHANNELS, (8,), 1), MaskRCNNPredictor(8, 8, CLASSES)
        return {"mask_roi_pool": pool, "mask_head": head, "mask_predictor": predictor}
    if kind == "keypoint":
        head, predictor = KeypointRCNNHeads(CHANNELS, (8,)), KeypointRCNNPredictor(8, 3)
        return {"keypoint_roi_pool": pool, "keypoint_head": head, "keypoint_predictor": predictor}
    return {}


def tiny_torchvision(kind: str) -> TorchvisionAdapter:
    """A detector of the Faster R-CNN family with random weights, uneven enough to find something in noise."""
    family = {"faster": detection.FasterRCNN, "mask": detection.MaskRCNN, "keypoint": detection.KeypointRCNN}
    with torch.random.fork_rng():
        extra = extra_heads(kind)
        torch.manual_seed(3)  # after the extra heads, so that all of the family share one box path
        detector = family[kind](
            TinyFPN(),
            rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3),
            box_roi_pool=ops.MultiScaleRoIAlign(["0", "1"], 7, 2),
            box_head=TwoMLPHead(CHANNELS * 49, 32),
            box_predictor=FastRCNNPredictor(32, CLASSES),
            box_score_thresh=0.25,  # cuts among the random scores, and before the limit of 100 does
            min_size=96,
            max_size=160,
            rpn_post_nms_top_n_test=60,
            **extra,
        )
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for linear in (detector.roi_heads.box_predictor.cls_score, detector.roi_heads.box_predictor.bbox_pred):
            nn.init.normal_(linear.weight, std=0.3)
    return TorchvisionAdapter(detector.eval())


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
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, *size])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)]
    model = helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.weights)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.fixture(scope="module")
def yolox_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    onnx.save(tiny_yolox(), path)
    return path


def example(name: str) -> Any:
    """A detector of examples/coco_person.py."""
    if name == "faster_rcnn":
        pytest.importorskip("efficientnet_lite_pytorch", reason="its backbone needs efficientnet-lite-pytorch")
    spec = importlib.util.spec_from_file_location("coco_person", ROOT / "examples" / "coco_person.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


# --- what the contract is checked with -------------------------------------------------------------------------------


def photographs() -> list[np.ndarray]:
    """Two photographs of people, of different shapes."""
    image = pytest.importorskip("PIL.Image")
    folder = SHARED / "data" / "coco-person"
    listed = json.loads((folder / "instances_val.json").read_text())["images"]
    wide = next(found for found in listed if found["width"] > found["height"])
    tall = next(found for found in listed if found["width"] < found["height"])
    return [np.array(image.open(folder / "images" / found["file_name"]).convert("RGB")) for found in (wide, tall)]


def noise(*sizes: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


class Case:
    """An adapter with images as its detector takes them, and the detector's own suppression as a stage."""

    def __init__(self, adapter: Any, rgb: list[np.ndarray]):
        self.adapter, self.rgb = adapter, rgb
        self.images = [adapter.prepare(pixels)[0] for pixels in rgb]

    def own_suppression(self, features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
        if isinstance(self.adapter, OnnxAdapter):
            return self.adapter.suppress(features, candidates)
        heads = self.adapter.detector.roi_heads
        keep = [ops.batched_nms(c.boxes, c.scores, c.labels, heads.nms_thresh) for c in candidates]
        return [c[rows[: heads.detections_per_img]] for c, rows in zip(candidates, keep, strict=True)]

    def own(self) -> list[dict[str, Tensor]]:
        with torch.no_grad():
            found: list[dict[str, Tensor]] = self.adapter.detector(self.images)
        return found

    def state(self) -> Any:
        """Everything a run might leave behind in the detector."""
        detector = self.adapter.detector
        modules = dict(detector.named_modules()) if isinstance(detector, nn.Module) else {"": detector}
        return self.adapter.fingerprint(), {
            name: (sorted(vars(module)), list(getattr(module, "_modules", {})), getattr(module, "training", None))
            for name, module in modules.items()
        }


@pytest.fixture(
    scope="module",
    params=[
        "faster_rcnn",
        "mask_rcnn",
        "keypoint_rcnn",
        "yolox",
        pytest.param("trained faster_rcnn", marks=trained),
        pytest.param("trained yolox", marks=trained),
    ],
)
def case(request: pytest.FixtureRequest, yolox_file: Path) -> Iterator[Case]:
    which, _, name = request.param.rpartition(" ")
    if which:
        yield Case(example(name), photographs())
    elif name == "yolox":
        yield Case(OnnxAdapter(yolox_file), noise((50, 90), (200, 120), (64, 96)))
    else:
        yield Case(tiny_torchvision(name.partition("_")[0]), noise((70, 110), (90, 64), (200, 150)))


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Bit for bit."""
    assert [sorted(result) for result in found] == [sorted(result) for result in expected]
    for one, other in zip(found, expected, strict=True):
        for key in one:
            assert one[key].dtype == other[key].dtype, key
            assert torch.equal(one[key], other[key]), key


def columns(found: Detections) -> dict[str, Tensor]:
    return {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}


def keep_all(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    return candidates


def keep_none(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    return [found[torch.zeros(0, dtype=torch.int64)] for found in candidates]


class TestContract:
    def test_own_suppression_as_stage_gives_the_detectors_own_output(self, case: Case) -> None:
        own = case.own()
        assert all(len(result["boxes"]) >= 2 for result in own), "a detector that finds nothing proves nothing"
        assert_same(case.adapter.run(case.own_suppression, case.images), own)

    def test_stage_decides(self, case: Case) -> None:
        def shuffled(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            kept = [found[torch.arange(len(found)).flip(0)[:5]] for found in candidates]
            return [found.replace(scores=found.scores / 2, ious=torch.linspace(0, 1, len(found))) for found in kept]

        _, candidates, _ = case.adapter.extract(case.images)
        results = case.adapter.run(shuffled, case.images)
        for result, found in zip(results, candidates, strict=True):
            assert torch.equal(result["ious"], torch.linspace(0, 1, 5))
            assert torch.equal(result["scores"], found.scores.flip(0)[:5] / 2)
            assert torch.equal(result["labels"], found.labels.flip(0)[:5])

    def test_extract_gives_what_the_stage_sees(self, case: Case) -> None:
        seen: list[Any] = []
        case.adapter.run(lambda *args: seen.append(args) or keep_none(*args), case.images)
        features, candidates, _ = case.adapter.extract(case.images)
        assert all(map(torch.equal, features.levels, seen[0][0].levels))
        assert (features.strides, features.image_sizes) == (seen[0][0].strides, seen[0][0].image_sizes)
        for found, other in zip(candidates, seen[0][1], strict=True):
            assert_same([columns(found)], [columns(other)])

    def test_candidates_lie_in_the_network_frame(self, case: Case) -> None:
        """Mapped back by the frame of ``extract``, they are what ``run`` reports in pixels of the detector's input."""
        features, candidates, frames = case.adapter.extract(case.images)
        results = case.adapter.run(keep_all, case.images)
        for found, frame, size, result in zip(candidates, frames, features.image_sizes, results, strict=True):
            assert (found.boxes >= 0).all()
            assert (found.boxes <= torch.tensor([size[1], size[0]] * 2)).all()
            torch.testing.assert_close(frame.to_image(found.boxes), result["boxes"], atol=1e-3, rtol=0)
            height, width = frame.image_size
            corner = frame.to_network(torch.tensor([[0.0, 0, width, height]]))
            torch.testing.assert_close(corner, torch.tensor([[0.0, 0, size[1], size[0]]]), atol=1e-3, rtol=0)

    def test_prepared_frame_is_the_size_of_what_was_prepared(self, case: Case) -> None:
        for rgb in case.rgb:
            prepared, to_input = case.adapter.prepare(rgb)
            _, _, (frame,) = case.adapter.extract([prepared])
            assert to_input.image_size == rgb.shape[:2]
            box = torch.tensor([[0.0, 0, rgb.shape[1], rgb.shape[0]]])
            height, width = frame.image_size
            torch.testing.assert_close(to_input.to_network(box), torch.tensor([[0.0, 0, width, height]]))

    def test_strides_where_a_patch_changes_the_map(self, case: Case) -> None:
        """The middle of the cells that change most, against the middle of the patch; in cells of each level."""
        plain = case.rgb[0]
        height, width = plain.shape[:2]
        side = max(height, width) // 12
        strides = case.adapter.extract(case.images[:1])[0].strides
        errors: list[list[Tensor]] = [[] for _ in strides]
        for x, y in [(0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (0.7, 0.7), (0.5, 0.5)]:
            left, top = int(x * width - side / 2), int(y * height - side / 2)
            patched = plain.copy()
            patched[top : top + side, left : left + side] ^= 255
            box = torch.tensor([[left, top, left + side, top + side]]).float()
            (prepared, to_input), (blank, _) = case.adapter.prepare(patched), case.adapter.prepare(plain)
            features, _, (frame, _) = case.adapter.extract([prepared, blank])
            x1, y1, x2, y2 = to_input.then(frame).to_network(box)[0].tolist()
            for found, level, stride in zip(errors, features.levels, strides, strict=True):
                change = (level[0] - level[1]).square().sum(0)
                rows, cols = torch.nonzero(change > change.max() / 2).unbind(1)
                weight = change[rows, cols] / change[rows, cols].sum()
                center = torch.stack([(weight * (cols + 0.5)).sum(), (weight * (rows + 0.5)).sum()])
                found.append(center - torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2]) / stride)
        for found in errors:
            assert torch.stack(found).median(0).values.abs().max() < 0.75, errors
            assert torch.stack(found).abs().median() < 0.75, errors

    def test_leaves_the_detector_untouched(self, case: Case) -> None:
        def broken(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            raise RuntimeError("the stage broke")

        before, own = case.state(), case.own()
        case.adapter.run(case.own_suppression, case.images)
        case.adapter.extract(case.images)
        with pytest.raises(RuntimeError, match="the stage broke"):
            case.adapter.run(broken, case.images)
        assert case.state() == before
        assert_same(case.own(), own)

    def test_inputs_stay_as_they_are(self, case: Case) -> None:
        before = [torch.as_tensor(image).clone() for image in case.images]
        case.adapter.run(case.own_suppression, case.images)
        case.adapter.extract(case.images)
        assert all(torch.equal(torch.as_tensor(image), old) for image, old in zip(case.images, before, strict=True))

    def test_one_image_alone(self, case: Case) -> None:
        image = case.images[:1]
        with torch.no_grad():
            own = case.adapter.detector(image)
        assert_same(case.adapter.run(case.own_suppression, image), own)

    def test_stage_that_keeps_nothing(self, case: Case) -> None:
        for result in case.adapter.run(keep_none, case.images):
            assert result["boxes"].shape == (0, 4)
            assert len(result["scores"]) == len(result["labels"]) == 0

    def test_no_candidates(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        if isinstance(case.adapter, OnnxAdapter):
            monkeypatch.setattr(case.adapter, "score_threshold", 1.0)
        else:
            monkeypatch.setattr(case.adapter.detector.roi_heads, "score_thresh", 1.0)
        features, candidates, frames = case.adapter.extract(case.images)
        assert [len(found) for found in candidates] == [0] * len(features) == [0] * len(frames)
        assert_same(case.adapter.run(case.own_suppression, case.images), case.own())

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
    def test_same_in_every_grad_mode(self, case: Case, mode: Callable[[], Any]) -> None:
        with mode():
            results = case.adapter.run(case.own_suppression, case.images)
            features, _, _ = case.adapter.extract(case.images)
        assert_same(results, case.own())
        assert not any(level.requires_grad for level in features.levels)
        assert all(map(torch.equal, features.levels, case.adapter.extract(case.images)[0].levels))

    def test_wrapped_without_a_head_the_detector_answers_alone(self, case: Case) -> None:
        with torch.no_grad():
            assert_same(IoURefiner(case.adapter)(case.images), case.own())

    def test_wrapped_with_a_head_the_same_keys_and_ious_in_every_grad_mode(self, case: Case) -> None:
        features, candidates, frames = case.adapter.extract(case.images)
        torch.manual_seed(0)
        head = IoUPredictor(features.channels, features.strides, width=4, hidden=(16,), output_size=3)
        nn.init.normal_(head.output.weight, std=1.0)  # so that predictions differ and boxes move
        head.detector = case.adapter.fingerprint()
        found = []
        for mode in (nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                found.append(IoURefiner(case.adapter, head)(case.images))
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])
        own = case.own()
        assert all(sorted(result) == sorted([*other, "ious"]) for result, other in zip(found[0], own, strict=True))
        assert sum(len(result["boxes"]) for result in found[0]) > 0
        for result, before, frame in zip(found[0], candidates, frames, strict=True):
            assert {len(values) for values in result.values()} == {len(result["boxes"])}
            assert result["ious"].min() >= 0
            assert result["ious"].max() <= 1
            inside = clip_boxes(result["boxes"], frame.image_size)
            torch.testing.assert_close(inside, result["boxes"], atol=1e-3, rtol=0)
            # Some boxes moved: not all of them are among the candidates.
            gap = torch.cdist(frame.to_network(result["boxes"]), before.boxes).amin(1)
            assert (gap > 0.01).any()

    def test_stays_on_its_device(self, case: Case) -> None:
        assert case.adapter.to("cpu") is case.adapter
        assert case.adapter.device == torch.device("cpu")
        assert case.adapter.extract(case.images)[0].device == case.adapter.device


# --- frames ----------------------------------------------------------------------------------------------------------

sides = st.integers(1, 4000)
scales = st.floats(0.05, 8)


@settings(deadline=None, max_examples=200)
@given(sides, sides, sides, sides, st.tuples(scales, scales), st.tuples(st.floats(-500, 500), st.floats(-500, 500)))
def test_boxes_come_back_through_resize_squash_letterbox_and_pad(
    height: int, width: int, new_height: int, new_width: int, scale: tuple[float, float], offset: tuple[float, float]
) -> None:
    boxes = torch.tensor([[0, 0, width, height], [width / 3, height / 5, width / 2, height]], dtype=torch.float64)
    squash = Frame.resize((height, width), (new_height, new_width))
    pad = Frame((new_height, new_width), offset=offset)
    letterboxed = Frame((height, width), scale, offset)
    for frame in (squash, squash.then(pad), letterboxed, letterboxed.then(Frame((1, 1), scale))):
        torch.testing.assert_close(frame.to_image(frame.to_network(boxes)), boxes, atol=1e-3, rtol=0)
    one_by_one = pad.to_network(squash.to_network(boxes))
    torch.testing.assert_close(squash.then(pad).to_network(boxes), one_by_one)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 200), st.integers(32, 200))
def test_letterbox_fills_one_side_and_comes_back(height: int, width: int, net_height: int, net_width: int) -> None:
    pixels, inner, frame = letterbox(np.full((height, width, 3), 255, np.uint8), (net_height, net_width))
    assert pixels.shape == (1, 3, net_height, net_width)
    assert inner[0] == net_height or inner[1] == net_width
    assert (abs(pixels[:, :, : inner[0], : inner[1]] - 255) < 1e-3).all()
    assert (pixels[:, :, inner[0] :] == 114).all()
    assert (pixels[:, :, :, inner[1] :] == 114).all()
    box = torch.tensor([[0.0, 0, width, height]])
    torch.testing.assert_close(frame.to_network(box), torch.tensor([[0.0, 0, inner[1], inner[0]]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(frame.to_image(frame.to_network(box)), box, atol=1e-3, rtol=0)


def test_letterbox_draws_a_rectangle_where_its_frame_says() -> None:
    image = np.zeros((300, 500, 3), np.uint8)
    image[60:180, 100:350] = (255, 0, 0)
    pixels, _, frame = letterbox(image, (416, 416))
    blue, green, red = pixels[0]
    assert not blue[:240].any()  # the picture itself; the padding below is grey
    assert not green[:240].any()
    rows, columns = np.nonzero(red[: round(300 * 416 / 500)] > 127)
    found = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
    expected = frame.to_network(torch.tensor([[100.0, 60, 350, 180]]))
    torch.testing.assert_close(found, expected, atol=0.75, rtol=0)


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_torchvision_names_what_it_does_not_take() -> None:
    with pytest.raises(TypeError, match=r"Faster R-CNN family .*got Linear"):
        TorchvisionAdapter(nn.Linear(2, 2))


@pytest.mark.parametrize("size", [(200, 100), (60, 90), (1, 400)])
def test_torchvision_prepares_to_the_longest_side(size: tuple[int, int]) -> None:
    adapter = TorchvisionAdapter(tiny_torchvision("faster").detector, longest_side=160)
    tensor, frame = adapter.prepare(noise(size)[0])
    assert max(tensor.shape[1:]) == 160
    assert 0 <= tensor.min() <= tensor.max() <= 1
    corner = frame.to_network(torch.tensor([[0.0, 0, size[1], size[0]]]))
    torch.testing.assert_close(corner, torch.tensor([[0.0, 0, tensor.shape[2], tensor.shape[1]]]))


@pytest.mark.parametrize("size", [(12, 400), (400, 12), (160, 100), (97, 160)])
def test_torchvision_strides_whatever_the_shape(size: tuple[int, int]) -> None:
    """A panorama is padded to several times its short side, which therefore says little about the stride."""
    adapter = tiny_torchvision("faster")
    features, _, _ = adapter.extract([adapter.prepare(noise(size)[0])[0]])
    assert features.strides == (4, 8)


# --- ONNX ------------------------------------------------------------------------------------------------------------


def decoded_cell_by_cell(output: np.ndarray, size: tuple[int, int], threshold: float) -> list[tuple[Any, ...]]:
    """(score, label, x1, y1, x2, y2) of each box and class above the threshold, by falling score; clipped."""
    found, row = [], 0
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
                        found.append((score * objectness, label, x1, y1, x2, y2))
    assert row == output.shape[1]
    return sorted(found, reverse=True)


def test_onnx_boxes_are_those_of_a_decoder_written_cell_by_cell(yolox_file: Path) -> None:
    """The image has the size of the input, so that nothing but decoding and clipping lies between."""
    (rgb,) = noise((64, 96))
    session = onnxruntime.InferenceSession(yolox_file.read_bytes())
    (output,) = session.run(None, {"images": rgb[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32)})
    expected = decoded_cell_by_cell(output, (64, 96), 0.2)
    (found,) = OnnxAdapter(yolox_file, score_threshold=0.2).run(keep_all, [rgb])
    assert len(found["boxes"]) == len(expected) > 20
    order = found["scores"].argsort(descending=True)
    torch.testing.assert_close(found["scores"][order], torch.tensor([row[0] for row in expected]).float())
    assert found["labels"][order].tolist() == [row[1] for row in expected]
    boxes = torch.tensor([row[2:] for row in expected]).float()
    torch.testing.assert_close(found["boxes"][order], boxes, atol=1e-3, rtol=0)


def test_onnx_own_suppression_is_greedy_nms_per_class(yolox_file: Path) -> None:
    adapter = OnnxAdapter(yolox_file, nms_threshold=0.4)
    _, (found,), _ = adapter.extract(noise((64, 96)))
    keep = ops.batched_nms(found.boxes, found.scores, found.labels, 0.4)
    (result,) = adapter(noise((64, 96)))
    assert 2 <= len(keep) < len(found)
    assert torch.equal(result["boxes"], found.boxes[keep])
    assert torch.equal(result["scores"], found.scores[keep])


def test_onnx_finds_the_maps_under_the_head(yolox_file: Path) -> None:
    adapter = OnnxAdapter(yolox_file)
    assert adapter.features == ["map8", "map16", "map32"]
    assert adapter.strides == (8, 16, 32)
    features, _, _ = adapter.extract(noise((64, 96), (10, 10)))
    assert [level.shape for level in features.levels] == [(2, 6, 8, 12), (2, 6, 4, 6), (2, 6, 2, 3)]
    assert features.image_sizes == ((64, 96), (64, 64))


def test_onnx_batch_is_its_images_one_by_one(yolox_file: Path) -> None:
    adapter, images = OnnxAdapter(yolox_file), noise((50, 90), (200, 120))
    assert_same(adapter(images), adapter(images[:1]) + adapter(images[1:]))
    assert adapter([]) == []
    features, candidates, frames = adapter.extract([])
    assert len(features) == len(candidates) == len(frames) == 0


def test_onnx_leaves_the_file_and_tells_it_apart(yolox_file: Path, tmp_path: Path) -> None:
    content = yolox_file.read_bytes()
    adapter = OnnxAdapter.from_name(str(yolox_file))
    adapter(noise((64, 96)))
    assert yolox_file.read_bytes() == content
    assert list(yolox_file.parent.iterdir()) == [yolox_file]
    assert adapter.fingerprint() == hashlib.sha256(content).hexdigest()
    chosen = [OnnxAdapter(yolox_file, features=names).fingerprint() for names in (["map8"], ["map16"])]
    assert len({adapter.fingerprint(), *chosen}) == 3


def test_onnx_weights_beside_the_file(yolox_file: Path, tmp_path: Path) -> None:
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


def test_onnx_non_finite_output_gives_no_box(tmp_path: Path) -> None:
    model = tiny_yolox()
    model.graph.node[-1].CopyFrom(helper.make_node("Div", ["raw", "zero"], ["output"]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    onnx.save(model, tmp_path / "broken.onnx")
    adapter = OnnxAdapter(tmp_path / "broken.onnx", features=["map8"])
    (result,) = adapter(noise((64, 96)))
    assert torch.isfinite(result["boxes"]).all()


class TestOnnxRefuses:
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
            ({"size": ("height", 96)}, r"of fixed height and width, got tensor\(float\) \[1, 3, 'height', 96\]"),
            ({"last": "Transpose"}, r"one output \(1, 126, 5 \+ classes\) for an input of 64 x 96.*\(7, 126, 1\)"),
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
        with pytest.raises(ValueError, match=r"`layout` must be one of 'yolox', got 'yolo'\. Did you mean 'yolox'\?"):
            OnnxAdapter(yolox_file, layout="yolo")
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


@trained
def test_trained_yolox_speaks_coco_and_finds_people() -> None:
    adapter, images = example("yolox"), photographs()
    official = json.loads((SHARED / "data" / "coco-80" / "instances_test.json").read_text())["categories"]
    assert adapter.category_ids == dict(enumerate(sorted(category["id"] for category in official)))
    truth = json.loads((SHARED / "data" / "coco-person" / "instances_val.json").read_text())
    wide = next(found for found in truth["images"] if found["width"] > found["height"])
    largest = max((a for a in truth["annotations"] if a["image_id"] == wide["id"]), key=lambda a: a["area"])
    x, y, w, h = largest["bbox"]
    found = adapter(images[:1])[0]
    people = found["boxes"][(found["labels"] == 0) & (found["scores"] > 0.3)]
    assert ops.box_iou(people, torch.tensor([[x, y, x + w, y + h]])).max() > 0.6
