"""Joint training, one contract over every detector that has it: the detector's own losses and those of the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from iou_refiner import HeadConfig, IoUHead, IoURefiner
from iou_refiner.detector.adapter import TrainingImage
from iou_refiner.training.joint import new_head
from tests.adapters.joint_cases import CASES, WARNINGS, JointCase

SMALL = HeadConfig(width=8, mix=8, hidden=(16, 16))
OURS = {"loss_iou", "loss_iou_ranking", "loss_iou_deltas"}

pytestmark = [pytest.mark.filterwarnings(warning) for warning in WARNINGS]


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest) -> JointCase:
    return CASES[request.param]()


@pytest.fixture
def case(built: JointCase) -> Iterator[JointCase]:
    """With weights, buffers and mode as they were, whatever a test did."""
    yield built
    built.restart()
    built.adapter.detector.zero_grad(set_to_none=True)
    built.adapter.detector.eval()


@pytest.fixture
def head(built: JointCase) -> IoUHead:
    torch.manual_seed(0)
    return new_head(built.adapter, built.case.images[:2], SMALL)


def run(case: JointCase, call: Any) -> tuple[dict[str, Any], Tensor]:
    """Losses, and the state that torch's generator is left in, from one state of everything."""
    case.restart()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - of which mmdet's samplers draw
    with case.training():
        losses = call()
    return losses, torch.get_rng_state()


def flat(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


def total(losses: dict[str, Any]) -> Tensor:
    return torch.stack(
        [part.sum() for name, value in losses.items() if "acc" not in name for part in flat(value)]
    ).sum()


class TestJointContract:
    @pytest.mark.parametrize("weight", [0.0, 1.0])
    def test_the_detectors_own_losses_are_the_same_to_the_last_bit(
        self, case: JointCase, head: IoUHead, weight: float
    ) -> None:
        refiner = IoURefiner(case.adapter, head, loss_weight=weight).train()
        own, state = run(case, case.own_losses)
        ours, state_after = run(case, lambda: refiner(*case.batch))
        assert set(ours) - set(own) == OURS
        for name, value in own.items():
            assert all(map(torch.equal, flat(ours[name]), flat(value))), name
        assert torch.equal(state, state_after)
        assert all((ours[name] == 0) == (weight == 0) for name in OURS)

    def test_at_weight_0_the_detectors_gradients_are_its_own(self, case: JointCase, head: IoUHead) -> None:
        refiner, detector = IoURefiner(case.adapter, head, loss_weight=0).train(), case.adapter.detector
        total(run(case, case.own_losses)[0]).backward()
        own = gradients(detector)
        detector.zero_grad(set_to_none=True)
        total(run(case, lambda: refiner(*case.batch))[0]).backward()
        ours = gradients(detector)
        assert own.keys() <= ours.keys()
        for name, gradient in ours.items():
            assert torch.equal(gradient, own.get(name, torch.zeros_like(gradient))), name

    def test_the_gradient_of_the_iou_reaches_the_backbone_and_all_of_the_head(
        self, case: JointCase, head: IoUHead
    ) -> None:
        refiner = IoURefiner(case.adapter, head).train()
        losses, _ = run(case, lambda: refiner(*case.batch))
        losses["loss_iou"].backward(retain_graph=True)
        reached = gradients(case.adapter.detector)
        assert any("backbone" in name and gradient.abs().max() > 0 for name, gradient in reached.items())
        # Not through the boxes: what proposes them learns from the detector's own losses alone.
        assert not any(gradient.abs().max() > 0 for name, gradient in reached.items() if "rpn" in name)
        total({name: losses[name] for name in OURS}).backward()
        assert gradients(head).keys() == dict(head.named_parameters()).keys()

    def test_what_the_head_sees_is_what_the_detector_sees(self, case: JointCase) -> None:
        seen: list[TrainingImage] = []
        extracted = case.adapter.extract(case.case.images[:2])[0]

        def remember(features: Any, images: list[TrainingImage]) -> dict[str, Tensor]:
            seen.extend(images)
            for image, (height, width) in zip(images, features.image_sizes, strict=True):
                limit = torch.tensor([width, height, width, height]) + 1.0
                assert (image.gt_boxes <= limit).all()
                assert len(image.proposals) > 20
                assert not image.proposals.requires_grad
                assert (image.proposals[:, 2:] >= image.proposals[:, :2]).all()
            assert (features.channels, features.strides) == (extracted.channels, extracted.strides)
            assert features.levels[0].requires_grad
            return {"loss_other": features.levels[0].sum() * 0}

        case.adapter.detector.train()
        losses, _ = run(case, lambda: case.adapter.losses(remember, *case.batch))
        assert "loss_other" in losses
        assert [len(image.gt_boxes) for image in seen] == [2, 1]
        assert seen[0].gt_labels.tolist() == [1, 2]

    def test_with_the_head_in_inference_mode_the_detector_trains_alone(self, case: JointCase, head: IoUHead) -> None:
        if "mmdet" in type(case.adapter).__module__:
            return  # whose call is train_step, the detector's own
        refiner = IoURefiner(case.adapter, head).train()
        head.eval()
        own, _ = run(case, case.own_losses)
        assert run(case, lambda: refiner(*case.batch))[0].keys() == own.keys()

    def test_in_bfloat16(self, case: JointCase, head: IoUHead) -> None:
        refiner = IoURefiner(case.adapter, head).train()

        def call() -> dict[str, Any]:
            with torch.autocast("cpu", torch.bfloat16):
                return refiner(*case.batch)

        if (
            "detectron2" in type(case.adapter.detector).__module__ and case.adapter.name == "FCOS"
        ):  # its loss mixes dtypes
            with pytest.raises(RuntimeError, match="dtypes match"), torch.autocast("cpu", torch.bfloat16):
                run(case, case.own_losses)
            return
        dtypes = []
        head.trunk.register_forward_hook(lambda module, given, embedding: dtypes.append(embedding.dtype))
        losses, _ = run(case, call)
        assert dtypes == [torch.float32]
        for name in OURS:
            assert losses[name].dtype == torch.float32
            assert torch.isfinite(losses[name])
        total({name: losses[name] for name in OURS}).backward()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(head).values())

    def test_a_class_aware_head_learns_the_classes_that_are_there(self, case: JointCase) -> None:
        head = new_head(case.adapter, case.case.images[:2], SMALL, num_classes=4)
        refiner = IoURefiner(case.adapter, head).train()
        losses, _ = run(case, lambda: refiner(*case.batch))
        total({name: losses[name] for name in OURS}).backward()
        for output in (head.iou_output, head.ranking_output, head.deltas_output):
            learned = output.weight.grad.unflatten(0, (4, -1)).abs().sum((1, 2))
            assert learned.gt(0).tolist() == [False, True, True, False]

    def test_the_detector_is_left_as_it_was(self, case: JointCase, head: IoUHead) -> None:
        refiner, before = IoURefiner(case.adapter, head), case.case.state()
        case.adapter.detector.train()
        refiner.train()
        run(case, lambda: refiner(*case.batch))
        case.adapter.detector.eval()
        case.restart()
        assert case.case.state() == before
