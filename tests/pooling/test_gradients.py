"""Gradients of Precise RoI Pooling, to the boxes and to the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from iou_refiner.pooling import portable, taps
from iou_refiner.pooling.functional import prroi_pool
from tests.kit.reference import prroi_pool_gradient_reference
from tests.pooling.maps import in_cells, maps_of, random_map

# The contract: the largest error of the gradient to a box, relative to the largest gradient.
GRADIENT = 1e-5


def gradient_error(boxes: Tensor, stride: float, step: float) -> float:
    """Largest error of the gradient to boxes, relative to the largest gradient; float32 against float64 differences."""
    feature = random_map()
    boxes = boxes.clone().requires_grad_()
    pooled = prroi_pool(maps_of(feature, strides=(stride,)), boxes)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad(pooled, boxes, upstream)
    expected = np.array(
        [
            prroi_pool_gradient_reference(feature[0].double().numpy(), box, grad, step)
            for box, grad in zip(in_cells(boxes, stride), upstream.double().numpy(), strict=True)
        ]
    )
    return float(np.abs(slope.numpy() * stride - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("size", [9, 3, 0.7, 0.05, 0.01])
def test_gradient_to_boxes(size: float) -> None:
    corner = torch.rand(6, 2) * 12
    boxes = torch.cat([corner, corner + size * (0.5 + torch.rand(6, 2))], 1)
    assert gradient_error(boxes * 8, 8.0, 1e-6) <= GRADIENT


def test_gradient_to_boxes_with_edges_on_cells() -> None:
    cells = torch.tensor([[0, 0, 7, 7], [2, 3, 9, 10], [-1, 4, 6, 12], [3, 3, 17, 14], [5, 2, 6, 3], [-7, -7, 21, 14]])
    assert gradient_error((cells + 0.5) * 4, 4.0, 1e-7) <= GRADIENT


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9])
def test_gradient_of_a_vanishing_box_keeps_its_digits(size: float) -> None:
    """Over a ridge: the mean of 1 - |x - 5| over [5 - p, 5 + q] is 1 - (p^2 + q^2) / (2 (p + q))."""
    ridge = torch.zeros(1, 1, 9, 11, dtype=torch.float64)
    ridge[..., 5] = 1
    p, q = size, 2 * size
    box = torch.tensor([[5 - p, 3.0, 5 + q, 3.0 + size]], dtype=torch.float64, requires_grad=True)
    pooled = prroi_pool(maps_of(ridge), box, output_size=1, aligned=False)
    pooled.sum().backward()
    assert pooled.item() == pytest.approx(1 - (p * p + q * q) / (2 * (p + q)), abs=1e-12)
    by_edge = [(p * (p + q) - (p * p + q * q) / 2) / (p + q) ** 2, -(q * (p + q) - (p * p + q * q) / 2) / (p + q) ** 2]
    assert box.grad is not None
    torch.testing.assert_close(box.grad[0, ::2], torch.tensor(by_edge, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(box.grad[0, 1::2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("aligned", [True, False])
def test_gradcheck_of_boxes_and_features(aligned: bool) -> None:
    feature = random_map(5, 6, 2).double().requires_grad_()
    whole = [[0, 0, 3, 3], [1, 1, 5, 4], [-2, 0, 2, 6], [1.5, 0.5, 4.5, 3.5], [0.5, 0.5, 1.5, 1.5]]
    scattered = [[0.31, 0.77, 2.13, 4.99], [-1.2, -3.4, 9.1, 8.7], [2.04, 2.03, 2.31, 2.4], [8, 8, 9, 9]]
    boxes = torch.tensor(whole + scattered, dtype=torch.float64, requires_grad=True)

    def pool(boxes: Tensor, feature: Tensor) -> Tensor:
        return prroi_pool(maps_of(feature), boxes, output_size=3, aligned=aligned)

    assert torch.autograd.gradcheck(pool, (boxes, feature), eps=1e-7, atol=1e-5)


def test_only_the_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Tensor:
        raise AssertionError("nothing needs this gradient")

    boxes = torch.tensor([[1.0, 2, 6, 7]])
    with monkeypatch.context() as patch:
        patch.setattr(portable, "backward_table", never)
        prroi_pool(maps_of(random_map()), boxes.requires_grad_()).sum().backward()
    monkeypatch.setattr(portable, "backward_boxes", never)
    monkeypatch.setattr(portable, "backward_saved", never)
    feature = random_map().requires_grad_()
    prroi_pool(maps_of(feature), boxes.detach()).sum().backward()
    assert feature.grad is not None


def test_gradient_to_features_adds_up_over_boxes_images_and_levels() -> None:
    levels = [random_map(6, 7, 2, 2).double().requires_grad_(), random_map(3, 4, 2, 2).double().requires_grad_()]
    boxes = torch.tensor([[0, 0, 5, 5], [1.0, 1, 6, 5], [1.0, 1, 6, 5], [2, 0, 9, 3.5]], dtype=torch.float64)
    image, level = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 0, 1])

    def pool(fine: Tensor, coarse: Tensor) -> Tensor:
        features = maps_of(fine, coarse, strides=(1.0, 2.0))
        return prroi_pool(features, boxes, image_index=image, level=level, output_size=2)

    assert torch.autograd.gradcheck(pool, tuple(levels))


def test_the_gradient_to_boxes_uses_the_taps_of_the_forward_pass_again(monkeypatch: pytest.MonkeyPatch) -> None:
    built, original = [], taps._outer
    monkeypatch.setattr(taps, "_outer", lambda *arguments: built.append(1) or original(*arguments))
    boxes = torch.tensor([[1.0, 2, 6, 7], [0.5, 3, 9, 8.2]])

    def slope() -> Tensor:
        built.clear()
        point = boxes.clone().requires_grad_()
        return torch.autograd.grad(prroi_pool(maps_of(random_map()), point).square().sum(), point)[0]

    kept = slope()
    assert len(built) == 1
    # Nothing is kept of more boxes than are handled at once.
    monkeypatch.setattr(taps, "_CHUNK_TAPS", 1)
    listed_again = slope()
    assert len(built) > 2
    torch.testing.assert_close(kept, listed_again)
    # Nor where no gradient to the boxes is needed.
    monkeypatch.setattr(portable, "_profile", None)
    with torch.no_grad():
        prroi_pool(maps_of(random_map()), boxes.requires_grad_())
    prroi_pool(maps_of(random_map().requires_grad_()), boxes.detach())


def test_a_second_derivative_is_refused_not_wrong() -> None:
    boxes = torch.tensor([[1.0, 2, 6, 7]], requires_grad=True)
    (slope,) = torch.autograd.grad(prroi_pool(maps_of(random_map()), boxes).pow(2).sum(), boxes, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()
