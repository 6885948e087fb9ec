"""What is particular to a detector of one's own: what may be exchanged, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from examples import custom_adapter
from iou_refiner import Detections, ImageTransform
from iou_refiner.adapters.custom import CustomAdapter
from tests.adapters.case import keep_all, noise


def test_results_of_ones_own_type() -> None:
    """Boxes come to ``finish`` in pixels of the detector's input, clipped to it."""

    def beyond(features: Any, candidates: list[Detections]) -> list[Detections]:
        return [image.replace(boxes=image.boxes * 100 - 50) for image in candidates]

    adapter = CustomAdapter(
        custom_adapter.adapter().detector, custom_adapter.extract, finish=lambda detections: ("mine", detections)
    )
    name, (detections,) = adapter.run(beyond, [torch.rand(3, 64, 96)])
    assert name == "mine"
    assert (detections.boxes.amin(0) >= 0).all()
    assert detections.boxes.amax(0).tolist() == [96, 64, 96, 64]


def test_boxes_go_back_through_the_transform() -> None:
    """A detector that takes in its image at half the size."""

    def halved(detector: Any, images: list[torch.Tensor]) -> Any:
        features, candidates, _ = custom_adapter.extract(detector, [image[:, ::2, ::2] for image in images])
        return features, candidates, [ImageTransform.resize((64, 96), (32, 48))]

    adapter, image = CustomAdapter(custom_adapter.adapter().detector, halved), torch.rand(3, 64, 96)
    _, (candidates,), _ = adapter.extract([image])
    (result,) = adapter.run(keep_all, [image])
    torch.testing.assert_close(result["boxes"], candidates.boxes * 2)


def test_images_prepared_ones_own_way() -> None:
    def prepare(rgb: np.ndarray) -> tuple[torch.Tensor, ImageTransform]:
        return torch.from_numpy(rgb[::2, ::2].copy()).permute(2, 0, 1) / 255, ImageTransform.resize((64, 96), (32, 48))

    adapter = CustomAdapter(
        custom_adapter.adapter().detector, custom_adapter.extract, prepare=prepare, settings="halved"
    )
    image, transform = adapter.prepare(noise((64, 96))[0])
    assert (tuple(image.shape), transform.scale, adapter.settings()) == ((3, 32, 48), (0.5, 0.5), "halved")


def test_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"`detector` must be a torch module, got function.*iou_refiner\.Adapter"):
        CustomAdapter(keep_all, keep_all)


@pytest.mark.parametrize("cut", [1, 2])
def test_an_extract_that_forgets_images(cut: int) -> None:
    def forgetful(detector: nn.Module, images: Any) -> Any:
        extraction = list(custom_adapter.extract(detector, images))
        extraction[cut] = extraction[cut][:1]
        return tuple(extraction)

    adapter = CustomAdapter(custom_adapter.adapter().detector, forgetful)
    message = r"`extract` must give candidates and a transform for each image, got . and . for 2"
    with pytest.raises(ValueError, match=message):
        adapter.run(keep_all, [torch.rand(3, 32, 32)] * 2)
