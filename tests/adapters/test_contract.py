"""The adapter contract: one class over every detector of every framework. What is particular to one framework is in
test_<framework>_adapter.py, its detectors are in cases_<framework>.py."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from iou_refiner import Detections, FeatureMaps, Frame, IoUPredictor, IoURefiner, Stage
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
        "own": cases_custom.CASES,
    }.items()
    for name, build in cases.items()
}


def parameter(name: str) -> Any:
    """mmdet warns of its own deprecated parts at every call."""
    ignored = cases_mmdet.WARNINGS if name.startswith("mmdet") else ()
    return pytest.param(name, marks=[pytest.mark.filterwarnings(warning) for warning in ignored])


@pytest.fixture(scope="module", params=map(parameter, CASES))
def case(request: pytest.FixtureRequest) -> Case:
    built = MEASURED[request.param] = CASES[request.param]()
    return built


def columns(found: Detections) -> dict[str, Tensor]:
    return {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}


def part(height: int, width: int, *fractions: float) -> Tensor:
    """The box (1, 4) with these corners, in fractions of an image's width and height."""
    return torch.tensor([fractions]) * torch.tensor([width, height] * 2)


def in_image(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """The candidates that results can show, cut to their image: detectors may cut boxes only after suppression."""
    cut = [c.replace(boxes=clip_boxes(c.boxes, size)) for c, size in zip(candidates, features.image_sizes, strict=True)]
    return [found[valid_boxes(found.boxes)] for found in cut]


def best(found: Detections) -> Detections:
    """The twenty candidates of the highest scores, by falling score."""
    return found[found.scores.argsort(descending=True, stable=True)[:20]]


def inside_largest(boxes: Tensor) -> Tensor:
    """A box (1, 4) within the largest of ``boxes``, with which it has an IoU of .6."""
    x1, y1, x2, y2 = boxes[box_area(boxes).argmax()].tolist()
    width, height = x2 - x1, y2 - y1
    return torch.tensor([[x1 + 0.2 * width, y1 + 0.1 * height, x2 - 0.05 * width, y2 - 0.1 * height]])


def toy_maps(features: FeatureMaps) -> FeatureMaps:
    """Blank maps of the form the toy head is made for, of the same images: an oracle reads none."""
    blank = [torch.zeros(len(features), 4, side, side) for side in (4, 2)]
    return FeatureMaps(tuple(blank), (1, 2), features.image_sizes)


def with_ious(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
    """A stage that keeps a few candidates and gives each an IoU."""
    return [found[:4].replace(ious=torch.linspace(0.2, 0.8, len(found[:4]))) for found in candidates]


class TestContract:
    def test_own_suppression_as_stage_gives_the_detectors_own_output(self, case: Case) -> None:
        own = case.read(case.own())
        assert all(len(result["boxes"]) >= 2 for result in own), "a detector that finds nothing proves nothing"
        found = case.read(case.call(case.own_suppression, case.images))
        assert_same(found, own, case.tolerance)
        case.measured["parity"] = largest_difference(found, own)

    def test_stage_decides(self, case: Case) -> None:
        def shuffled(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            kept = [found[torch.arange(len(found)).flip(0)[:5]] for found in in_image(features, candidates)]
            return [found.replace(scores=found.scores / 2, ious=torch.linspace(0, 1, len(found))) for found in kept]

        features, candidates, _ = case.adapter.extract(case.images)
        results = case.read(case.call(shuffled, case.images))
        for result, found in zip(results, in_image(features, candidates), strict=True):
            assert torch.equal(result["ious"], torch.linspace(0, 1, 5))
            assert torch.equal(result["scores"], found.scores.flip(0)[:5] / 2)
            assert torch.equal(result["labels"], found.labels.flip(0)[:5])

    def test_extract_gives_what_the_stage_sees(self, case: Case) -> None:
        seen: list[Any] = []
        case.call(lambda *args: seen.append(args) or keep_none(*args), case.images)
        features, candidates, _ = case.adapter.extract(case.images)
        assert all(map(torch.equal, features.levels, seen[0][0].levels))
        assert (features.strides, features.image_sizes) == (seen[0][0].strides, seen[0][0].image_sizes)
        for found, other in zip(candidates, seen[0][1], strict=True):
            assert_same([columns(found)], [columns(other)])

    def test_candidates_lie_in_the_network_frame(self, case: Case) -> None:
        """Mapped back by the frame of ``extract``, they are what ``run`` reports in pixels of the detector's input."""
        features, candidates, frames = case.adapter.extract(case.images)
        results = case.read(case.call(keep_all, case.images))
        shown = in_image(features, candidates)
        for found, frame, size, result in zip(shown, frames, features.image_sizes, results, strict=True):
            reported = result["boxes"][valid_boxes(result["boxes"])]
            torch.testing.assert_close(frame.to_image(found.boxes), reported, atol=1e-3, rtol=0)
            height, width = frame.image_size
            corner = frame.to_network(torch.tensor([[0.0, 0, width, height]]))
            # Where the image begins is the detector's affair (a centred letterbox); it ends at the image size.
            assert (corner[:, :2] >= 0).all()
            torch.testing.assert_close(corner[:, 2:], torch.tensor([[float(size[1]), size[0]]]), atol=1e-3, rtol=0)

    def test_prepared_frame_is_the_size_of_what_was_prepared(self, case: Case) -> None:
        for rgb in case.rgb:
            prepared, to_input = case.adapter.prepare(rgb)
            _, _, (frame,) = case.adapter.extract([prepared])
            assert to_input.image_size == rgb.shape[:2]
            box = torch.tensor([[0.0, 0, rgb.shape[1], rgb.shape[0]]])
            height, width = frame.image_size
            torch.testing.assert_close(to_input.to_network(box), torch.tensor([[0.0, 0, width, height]]))

    def test_boxes_come_back_through_the_whole_chain(self, case: Case) -> None:
        """Boxes drawn into the image, brought to the network by the frames, put into the mouth of the stage."""
        drawn, network = [], []
        _, _, frames = case.adapter.extract(case.images)
        for frame in frames:
            corners = [(0, 0, 1, 1), (0.1, 0.2, 0.35, 0.9), (0.6, 0.05, 0.95, 0.3)]
            drawn.append(torch.cat([part(*frame.image_size, *fractions) for fractions in corners]))
            network.append(frame.to_network(drawn[-1]))

        def draw(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            return [c[:3].replace(boxes=boxes) for c, boxes in zip(candidates, network, strict=True)]

        results = case.read(case.call(draw, case.images))
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

    def test_an_oracle_moves_boxes_onto_its_object(self, case: Case) -> None:
        """A head that knows one object in each image; boxes must come to fit it, in pixels of the detector's input.

        The IoU a box leaves with is the IoU it has there: geometry, order of rows and order of images agree.
        """
        features, candidates, frames = case.adapter.extract(case.images)
        objects = [inside_largest(best(found).boxes) for found in in_image(features, candidates)]
        stage = Stage(OracleHead(objects), nms="none", steps=15, step_size=0.05, score_alpha=0.0)

        def still(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            return [best(found) for found in in_image(features, candidates)]

        def oracle(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            return stage(toy_maps(features), still(features, candidates))

        before, after = (case.read(case.call(asked, case.images)) for asked in (still, oracle))
        for one, other, box, frame in zip(before, after, objects, frames, strict=True):
            assert torch.equal(one["scores"], other["scores"])
            truth = frame.to_image(box).expand(len(one["boxes"]), 4)
            was, now = paired_iou(one["boxes"], truth), paired_iou(other["boxes"], truth)
            edge = torch.tensor([*frame.image_size[::-1]] * 2)
            cut = ((other["boxes"] <= 0) | (other["boxes"] >= edge)).any(1)  # at the border, where it fits better since
            assert not cut.all()
            torch.testing.assert_close(other["ious"][~cut], now[~cut], atol=1e-3, rtol=0)
            assert (now >= other["ious"] - 1e-3).all()
            assert (now >= was - 1e-3).all()
            assert (now - was).max() > 0.15

    def test_leaves_the_detector_untouched(self, case: Case) -> None:
        def broken(features: FeatureMaps, candidates: list[Detections]) -> list[Detections]:
            raise RuntimeError("the stage broke")

        before, own = case.state(), case.read(case.own())
        case.call(case.own_suppression, case.images)
        case.adapter.extract(case.images)
        with pytest.raises(RuntimeError, match="the stage broke"):
            case.call(broken, case.images)
        assert case.state() == before
        assert_same(case.read(case.own()), own)

    def test_inputs_stay_as_they_are(self, case: Case) -> None:
        before = pickle.dumps(case.images)
        case.call(case.own_suppression, case.images)
        case.adapter.extract(case.images)
        assert pickle.dumps(case.images) == before

    def test_one_image_alone(self, case: Case) -> None:
        found = case.call(case.own_suppression, case.images[:1])
        assert_same(case.read(found), case.read(case.own_one()), case.tolerance)

    def test_stage_that_keeps_nothing(self, case: Case) -> None:
        for result in case.read(case.call(keep_none, case.images)):
            assert result["boxes"].shape == (0, 4)
            assert len(result["scores"]) == len(result["labels"]) == 0

    def test_no_candidates(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        case.silence(monkeypatch)
        features, candidates, frames = case.adapter.extract(case.images)
        assert [len(found) for found in candidates] == [0] * len(features) == [0] * len(frames)
        assert_same(case.read(case.call(case.own_suppression, case.images)), case.read(case.own()))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
    def test_same_in_every_grad_mode(self, case: Case, mode: Callable[[], Any]) -> None:
        with mode():
            results = case.call(case.own_suppression, case.images)
            features, _, _ = case.adapter.extract(case.images)
        assert_same(case.read(results), case.read(case.own()), case.tolerance)
        assert not any(level.requires_grad for level in features.levels)
        assert all(map(torch.equal, features.levels, case.adapter.extract(case.images)[0].levels))

    def test_twin_is_a_detector_of_its_own_kind_that_shares_every_weight(self, case: Case) -> None:
        own = case.adapter.detector
        if not isinstance(own, nn.Module):
            pytest.skip("no live modules to share")
        twin = case.adapter.twin(case.own_suppression)
        assert type(twin) is type(own)
        assert twin is not own
        for shared, weight in zip(twin.state_dict().values(), own.state_dict().values(), strict=True):
            assert shared.data_ptr() == weight.data_ptr()
        for _ in range(2):  # a twin may be kept and asked again
            assert_same(case.read(case.ask(twin, case.images)), case.read(case.own()), case.tolerance)
        scored = case.read(case.ask(case.adapter.twin(with_ious), case.images))
        assert_same(scored, case.read(case.call(with_ious, case.images)))
        assert all("ious" in result for result in scored)

    def test_wrapped_without_a_head_the_detector_answers_alone(self, case: Case) -> None:
        assert_same(case.read(case.ask(IoURefiner(case.adapter), case.images)), case.read(case.own()))

    def test_wrapped_with_a_head_the_same_keys_and_ious_in_every_grad_mode(self, case: Case) -> None:
        features, candidates, frames = case.adapter.extract(case.images)
        torch.manual_seed(0)
        head = IoUPredictor(features.channels, features.strides, width=4, hidden=(16,), output_size=3)
        for output in (head.output, head.energy, head.delta):  # so that predictions differ and boxes move
            nn.init.normal_(output.weight, std=1.0)
        # An energy that hardly differs, or that lies far from 0, gives the ascent nothing to climb.
        index = torch.repeat_interleave(torch.arange(len(candidates)), torch.tensor([len(d) for d in candidates]))
        with torch.no_grad():
            read = head.read(head.encode(features), torch.cat([d.boxes for d in candidates]), index)
            energy = head.energy_of(read)
            head.energy.weight /= energy.std()
            head.energy.bias -= energy.mean() / energy.std()
        head.detector = case.adapter.fingerprint()
        refined = IoURefiner(case.adapter, head)
        found = []
        for mode in (nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                found.append(case.read(refined(case.images)))
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])
        own = case.read(case.own())
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
