"""The adapter contract: one class over every detector of every framework. What is particular to one framework is in
test_<framework>.py, its detectors are in cases_<framework>.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from iou_refiner import Adapter, Detections, FeatureMaps, HeadConfig, ImageTransform, IoUHead, IoURefiner, Stage
from iou_refiner.boxes import box_area, clip_boxes, paired_iou, valid_boxes
from tests.adapters import (
    cases_custom,
    cases_detectron2,
    cases_mmdet,
    cases_onnx,
    cases_torchvision,
    cases_transformers,
)
from tests.adapters.case import MEASURED, Case, assert_same, keep_all, keep_none, largest_difference
from tests.kit.toys import OracleHead

CASES = {
    f"{framework}: {name}": build
    for framework, cases in {
        "torchvision": cases_torchvision.CASES,
        "detectron2": cases_detectron2.CASES,
        "mmdet": cases_mmdet.CASES,
        "transformers": cases_transformers.CASES,
        "onnx": cases_onnx.CASES,
        "custom": cases_custom.CASES,
    }.items()
    for name, build in cases.items()
}


def parameter(name: str) -> Any:
    """mmdet warns of its own deprecated parts at every call."""
    ignored = cases_mmdet.WARNINGS if name.startswith("mmdet") else ()
    return pytest.param(name, marks=[pytest.mark.filterwarnings(warning) for warning in ignored])


@pytest.fixture(scope="module", params=map(parameter, CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Built when its first test runs; where its framework is absent, all its tests are skipped."""
    built = MEASURED[request.param] = CASES[request.param]()
    return built


def part(height: int, width: int, *fractions: float) -> Tensor:
    """The box (1, 4) with these corners, in fractions of an image's width and height."""
    return torch.tensor([fractions]) * torch.tensor([width, height] * 2)


def in_image(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """The candidates that results can show, clipped to their image: detectors may clip only after suppression."""
    clipped = [
        image.replace(boxes=clip_boxes(image.boxes, size))
        for image, size in zip(candidates, features.image_sizes, strict=True)
    ]
    return [image[valid_boxes(image.boxes)] for image in clipped]


def best(candidates: Detections) -> Detections:
    """The twenty candidates of the highest scores, by falling score."""
    return candidates[candidates.scores.argsort(descending=True, stable=True)[:20]]


def inside_largest(boxes: Tensor) -> Tensor:
    """A box (1, 4) within the largest of ``boxes``, with which it has an IoU of .6."""
    x1, y1, x2, y2 = boxes[box_area(boxes).argmax()].tolist()
    width, height = x2 - x1, y2 - y1
    return torch.tensor([[x1 + 0.2 * width, y1 + 0.1 * height, x2 - 0.05 * width, y2 - 0.1 * height]])


def toy_maps(features: FeatureMaps) -> FeatureMaps:
    """Blank maps of the form the oracle head is made for, of the same images: it does not use them."""
    blank = [torch.zeros(len(features), 4, side, side) for side in (4, 2)]
    return FeatureMaps(tuple(blank), (1, 2), features.image_sizes)


def with_ious(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A suppression that keeps a few candidates and gives each an IoU."""
    return [image[:4].replace(ious=torch.linspace(0.2, 0.8, len(image[:4]))) for image in candidates]


def head_with_opinions(case: Case) -> IoUHead:
    """An untrained head of the case's detector, whose predictions differ from box to box, so that boxes move."""
    features, candidates, _ = case.adapter.extract(case.images)
    torch.manual_seed(0)
    head = IoUHead(features.channels, features.strides, HeadConfig(width=4, hidden=(16,), output_size=3))
    for output in (head.iou_output, head.ranking_output, head.deltas_output):
        nn.init.normal_(output.weight, std=1.0)
    # A ranking that hardly differs, or that lies far from 0, gives the ascent nothing to climb.
    index = torch.repeat_interleave(torch.arange(len(candidates)), torch.tensor([len(d) for d in candidates]))
    with torch.no_grad():
        embedding = head.roi_embedding(head.encode(features), torch.cat([d.boxes for d in candidates]), index)
        logits = head.ranking_logits(embedding)
        head.ranking_output.weight /= logits.std()
        head.ranking_output.bias -= logits.mean() / logits.std()
    head.metadata = replace(head.metadata, fingerprint=case.adapter.fingerprint())
    return head


class TestContract:
    def test_is_an_adapter_and_says_what_it_is(self, case: Case) -> None:
        adapter = case.adapter
        assert isinstance(adapter, Adapter)
        assert adapter.name == type(adapter.detector).__name__
        assert adapter.fingerprint() == adapter.fingerprint() != ""
        assert adapter.settings() == adapter.settings() != ""

    def test_detect_gives_the_detectors_own_result(self, case: Case) -> None:
        assert_same(case.as_dicts(case.detect()), case.as_dicts(case.own()))

    def test_transforms_are_those_of_extract(self, case: Case) -> None:
        features, _, transforms = case.adapter.extract(case.images)
        assert case.adapter.transforms(case.images, features) == transforms
        assert len(transforms) == len(case.images)

    def test_training_follows_the_detector(self, case: Case) -> None:
        detector = case.adapter.detector
        assert case.adapter.training is False
        if isinstance(detector, nn.Module):  # anything else does not train
            before = case.state()
            detector.train()
            training = case.adapter.training
            detector.eval()
            assert (training, case.adapter.training) == (True, False)
            assert case.state() == before

    def test_own_suppression_gives_the_detectors_own_result(self, case: Case) -> None:
        own = case.as_dicts(case.own())
        assert all(len(result["boxes"]) >= 2 for result in own), "a detector that detects nothing proves nothing"
        results = case.as_dicts(case.run(case.own_suppression, case.images))
        assert_same(results, own, case.tolerance)
        case.measured["parity"] = largest_difference(results, own)

    def test_the_suppression_decides(self, case: Case) -> None:
        def shuffled(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            last = [image[torch.arange(len(image)).flip(0)[:5]] for image in in_image(features, candidates)]
            return [image.replace(scores=image.scores / 2, ious=torch.linspace(0, 1, len(image))) for image in last]

        features, candidates, _ = case.adapter.extract(case.images)
        results = case.as_dicts(case.run(shuffled, case.images))
        for result, image in zip(results, in_image(features, candidates), strict=True):
            assert torch.equal(result["ious"], torch.linspace(0, 1, 5))
            assert torch.equal(result["scores"], image.scores.flip(0)[:5] / 2)
            assert torch.equal(result["labels"], image.labels.flip(0)[:5])

    def test_extract_gives_what_the_suppression_gets(self, case: Case) -> None:
        calls: list[Any] = []
        case.run(lambda *args: calls.append(args) or keep_none(*args), case.images)
        features, candidates, _ = case.adapter.extract(case.images)
        assert all(map(torch.equal, features.levels, calls[0][0].levels))
        assert (features.strides, features.image_sizes) == (calls[0][0].strides, calls[0][0].image_sizes)
        for image, other in zip(candidates, calls[0][1], strict=True):
            assert_same([image.to_dict()], [other.to_dict()])

    def test_candidates_are_in_network_pixels(self, case: Case) -> None:
        """Mapped back by the transforms of ``extract``, they are what ``run`` reports in pixels of the detector's
        input."""
        features, candidates, transforms = case.adapter.extract(case.images)
        results = case.as_dicts(case.run(keep_all, case.images))
        shown = in_image(features, candidates)
        for image, transform, size, result in zip(shown, transforms, features.image_sizes, results, strict=True):
            reported = result["boxes"][valid_boxes(result["boxes"])]
            torch.testing.assert_close(transform.to_image(image.boxes), reported, atol=1e-3, rtol=0)
            height, width = transform.image_size
            corner = transform.to_network(torch.tensor([[0.0, 0, width, height]]))
            # Where the image begins is the detector's affair (a centred letterbox); it ends at the image size.
            assert (corner[:, :2] >= 0).all()
            torch.testing.assert_close(corner[:, 2:], torch.tensor([[float(size[1]), size[0]]]), atol=1e-3, rtol=0)

    def test_the_transform_of_prepare_ends_where_that_of_extract_begins(self, case: Case) -> None:
        for rgb in case.rgb:
            prepared, to_input = case.adapter.prepare(rgb)
            _, _, (to_network,) = case.adapter.extract([prepared])
            assert to_input.image_size == rgb.shape[:2]
            box = torch.tensor([[0.0, 0, rgb.shape[1], rgb.shape[0]]])
            height, width = to_network.image_size
            torch.testing.assert_close(to_input.to_network(box), torch.tensor([[0.0, 0, width, height]]))

    def test_boxes_come_back_through_the_whole_chain(self, case: Case) -> None:
        """Boxes drawn into the image, brought to the network by the transforms, returned by the suppression."""
        drawn, network = [], []
        _, _, transforms = case.adapter.extract(case.images)
        for transform in transforms:
            corners = [(0, 0, 1, 1), (0.1, 0.2, 0.35, 0.9), (0.6, 0.05, 0.95, 0.3)]
            drawn.append(torch.cat([part(*transform.image_size, *fractions) for fractions in corners]))
            network.append(transform.to_network(drawn[-1]))

        def draw(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            return [c[:3].replace(boxes=boxes) for c, boxes in zip(candidates, network, strict=True)]

        results = case.as_dicts(case.run(draw, case.images))
        for result, boxes in zip(results, drawn, strict=True):
            torch.testing.assert_close(result["boxes"], boxes, atol=1e-3, rtol=0)
            gap = (result["boxes"] - boxes).abs().max().item()
            case.measured["geometry"] = max(gap, case.measured.get("geometry", 0.0))

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
            features, _, (to_network, _) = case.adapter.extract([prepared, blank])
            x1, y1, x2, y2 = to_input.then(to_network).to_network(box)[0].tolist()
            for gaps, level, stride in zip(errors, features.levels, strides, strict=True):
                change = (level[0] - level[1]).square().sum(0)
                rows, cols = torch.nonzero(change > change.max() / 2).unbind(1)
                weight = change[rows, cols] / change[rows, cols].sum()
                center = torch.stack([(weight * (cols + 0.5)).sum(), (weight * (rows + 0.5)).sum()])
                gaps.append(center - torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2]) / stride)
        for gaps in errors:
            assert torch.stack(gaps).median(0).values.abs().max() < 0.75, errors
            assert torch.stack(gaps).abs().median() < 0.75, errors

    def test_an_oracle_refines_boxes_onto_its_object(self, case: Case) -> None:
        """A head that knows one object in each image; boxes must come to fit it, in pixels of the detector's input.

        The IoU a box leaves with is the IoU it has there: geometry, order of rows and order of images agree.
        """
        features, candidates, transforms = case.adapter.extract(case.images)
        gt_boxes = [inside_largest(best(image).boxes) for image in in_image(features, candidates)]
        settings = {"nms": "none", "final_nms": "none", "ascent_steps": 15, "ascent_step_size": 0.05}
        stage = Stage(OracleHead(gt_boxes), **settings, score_alpha=0.0)

        def still(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            return [best(image) for image in in_image(features, candidates)]

        def refined(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            return stage(toy_maps(features), still(features, candidates))

        before, after = (case.as_dicts(case.run(suppression, case.images)) for suppression in (still, refined))
        for one, other, box, transform in zip(before, after, gt_boxes, transforms, strict=True):
            assert torch.equal(one["scores"], other["scores"])
            truth = transform.to_image(box).expand(len(one["boxes"]), 4)
            was, now = paired_iou(one["boxes"], truth), paired_iou(other["boxes"], truth)
            edge = torch.tensor([*transform.image_size[::-1]] * 2)
            # At the border a box is clipped on the way back, and fits better since.
            clipped = ((other["boxes"] <= 0) | (other["boxes"] >= edge)).any(1)
            assert not clipped.all()
            torch.testing.assert_close(other["ious"][~clipped], now[~clipped], atol=1e-3, rtol=0)
            assert (now >= other["ious"] - 1e-3).all()
            assert (now >= was - 1e-3).all()
            assert (now - was).max() > 0.15

    def test_leaves_the_detector_untouched(self, case: Case) -> None:
        def broken(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            raise RuntimeError("the suppression broke")

        before, own = case.state(), case.as_dicts(case.own())
        case.run(case.own_suppression, case.images)
        case.adapter.extract(case.images)
        with pytest.raises(RuntimeError, match="the suppression broke"):
            case.run(broken, case.images)
        assert case.state() == before
        assert_same(case.as_dicts(case.own()), own)

    def test_inputs_stay_as_they_are(self, case: Case) -> None:
        before = pickle.dumps(case.images)
        case.run(case.own_suppression, case.images)
        case.adapter.extract(case.images)
        assert pickle.dumps(case.images) == before

    def test_one_image_alone(self, case: Case) -> None:
        results = case.run(case.own_suppression, case.images[:1])
        assert_same(case.as_dicts(results), case.as_dicts(case.own_one()), case.tolerance)

    def test_a_suppression_that_leaves_nothing(self, case: Case) -> None:
        for result in case.as_dicts(case.run(keep_none, case.images)):
            assert result["boxes"].shape == (0, 4)
            assert len(result["scores"]) == len(result["labels"]) == 0

    def test_no_candidates(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        case.silence(monkeypatch)
        features, candidates, transforms = case.adapter.extract(case.images)
        assert [len(image) for image in candidates] == [0] * len(features) == [0] * len(transforms)
        assert_same(case.as_dicts(case.run(case.own_suppression, case.images)), case.as_dicts(case.own()))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
    def test_same_in_every_grad_mode(self, case: Case, mode: Callable[[], Any]) -> None:
        with mode():
            results = case.run(case.own_suppression, case.images)
            features, _, _ = case.adapter.extract(case.images)
        assert_same(case.as_dicts(results), case.as_dicts(case.own()), case.tolerance)
        assert not any(level.requires_grad for level in features.levels)
        assert all(map(torch.equal, features.levels, case.adapter.extract(case.images)[0].levels))

    def test_twin_is_a_detector_of_its_own_kind_that_shares_every_weight(self, case: Case) -> None:
        own, twin = case.adapter.detector, case.adapter.twin(case.own_suppression)
        assert type(twin) is type(own)
        assert twin is not own
        if isinstance(own, nn.Module):
            for shared, weight in zip(twin.state_dict().values(), own.state_dict().values(), strict=True):
                assert shared.data_ptr() == weight.data_ptr()
        for _ in range(2):  # a twin may be called again
            assert_same(case.as_dicts(case.call(twin, case.images)), case.as_dicts(case.own()), case.tolerance)
        scored = case.as_dicts(case.call(case.adapter.twin(with_ious), case.images))
        assert_same(scored, case.as_dicts(case.run(with_ious, case.images)))
        assert all("ious" in result for result in scored)

    def test_wrapped_without_a_head_the_detector_runs_alone(self, case: Case) -> None:
        assert_same(case.as_dicts(case.call(IoURefiner(case.adapter), case.images)), case.as_dicts(case.own()))

    def test_wrapped_with_a_head_the_same_keys_and_ious_in_every_grad_mode(self, case: Case) -> None:
        _, candidates, transforms = case.adapter.extract(case.images)
        refined = IoURefiner(case.adapter, head_with_opinions(case))
        results = []
        for mode in (nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                results.append(case.as_dicts(refined(case.images)))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])
        own = case.as_dicts(case.own())
        assert all(sorted(result) == sorted([*other, "ious"]) for result, other in zip(results[0], own, strict=True))
        assert sum(len(result["boxes"]) for result in results[0]) > 0
        for result, before, transform in zip(results[0], candidates, transforms, strict=True):
            assert {len(values) for values in result.values()} == {len(result["boxes"])}
            assert result["ious"].min() >= 0
            assert result["ious"].max() <= 1
            inside = clip_boxes(result["boxes"], transform.image_size)
            torch.testing.assert_close(inside, result["boxes"], atol=1e-3, rtol=0)
            # Some boxes moved: not all of them are among the candidates.
            gap = torch.cdist(transform.to_network(result["boxes"]), before.boxes).amin(1)
            assert (gap > 0.01).any()

    def test_stays_on_its_device(self, case: Case) -> None:
        assert case.adapter.to("cpu") is case.adapter
        assert case.adapter.device == torch.device("cpu")
        assert case.adapter.extract(case.images)[0].device == case.adapter.device


# --- transforms ------------------------------------------------------------------------------------------------------

sides = st.integers(1, 4000)
scales = st.floats(0.05, 8)


@settings(deadline=None, max_examples=200)
@given(sides, sides, sides, sides, st.tuples(scales, scales), st.tuples(st.floats(-500, 500), st.floats(-500, 500)))
def test_boxes_come_back_through_resize_squash_letterbox_and_pad(
    height: int, width: int, new_height: int, new_width: int, scale: tuple[float, float], offset: tuple[float, float]
) -> None:
    boxes = torch.tensor([[0, 0, width, height], [width / 3, height / 5, width / 2, height]], dtype=torch.float64)
    squash = ImageTransform.resize((height, width), (new_height, new_width))
    pad = ImageTransform((new_height, new_width), offset=offset)
    letterboxed = ImageTransform((height, width), scale, offset)
    for transform in (squash, squash.then(pad), letterboxed, letterboxed.then(ImageTransform((1, 1), scale))):
        torch.testing.assert_close(transform.to_image(transform.to_network(boxes)), boxes, atol=1e-3, rtol=0)
    one_by_one = pad.to_network(squash.to_network(boxes))
    torch.testing.assert_close(squash.then(pad).to_network(boxes), one_by_one)
