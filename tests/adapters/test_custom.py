"""What is particular to a detector of one's own: what may be exchanged, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from iou_refiner import Detections, Frame
from iou_refiner.adapters.custom import OwnAdapter
from tests.adapters.case import keep_all, noise
from tests.adapters.cases_custom import own_example


def test_results_of_ones_own_type() -> None:
    """Boxes come to ``finish`` in pixels of the detector's input, clipped to it."""
    example = own_example()

    def beyond(features: Any, candidates: list[Detections]) -> list[Detections]:
        return [found.replace(boxes=found.boxes * 100 - 50) for found in candidates]

    adapter = OwnAdapter(example.adapter().detector, example.look, finish=lambda found: ("mine", found))
    name, (found,) = adapter.run(beyond, [torch.rand(3, 64, 96)])
    assert name == "mine"
    assert (found.boxes.amin(0) >= 0).all()
    assert found.boxes.amax(0).tolist() == [96, 64, 96, 64]


def test_boxes_go_back_through_the_frame() -> None:
    """A detector that looks at its image at half the size."""
    example = own_example()

    def halved(detector: Any, images: list[torch.Tensor]) -> Any:
        features, candidates, _ = example.look(detector, [image[:, ::2, ::2] for image in images])
        return features, candidates, [Frame.resize((64, 96), (32, 48))]

    adapter, image = OwnAdapter(example.adapter().detector, halved), torch.rand(3, 64, 96)
    _, (found,), _ = adapter.extract([image])
    (result,) = adapter.run(keep_all, [image])
    torch.testing.assert_close(result["boxes"], found.boxes * 2)


def test_images_prepared_ones_own_way() -> None:
    example = own_example()

    def prepare(rgb: np.ndarray) -> tuple[torch.Tensor, Frame]:
        return torch.from_numpy(rgb[::2, ::2].copy()).permute(2, 0, 1) / 255, Frame.resize((64, 96), (32, 48))

    adapter = OwnAdapter(example.adapter().detector, example.look, prepare=prepare, settings="halved")
    image, frame = adapter.prepare(noise((64, 96))[0])
    assert (tuple(image.shape), frame.scale, adapter.settings()) == ((3, 32, 48), (0.5, 0.5), "halved")


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"`detector` must be a torch module, got function.*iou_refiner\.Adapter"):
        OwnAdapter(keep_all, keep_all)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_look_that_forgets_images(cut: int) -> None:
    example = own_example()

    def forgetful(detector: nn.Module, images: Any) -> Any:
        seen = list(example.look(detector, images))
        seen[cut] = seen[cut][:1]
        return tuple(seen)

    adapter = OwnAdapter(example.adapter().detector, forgetful)
    with pytest.raises(ValueError, match=r"`look` must give candidates and a frame for each image, got . and . for 2"):
        adapter.run(keep_all, [torch.rand(3, 32, 32)] * 2)
