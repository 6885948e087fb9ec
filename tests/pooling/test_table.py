"""The table of feature maps, and the level each box is pooled from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from iou_refiner.pooling.functional import assign_levels, prroi_pool
from iou_refiner.pooling.table import FeatureTable
from tests.pooling.maps import maps_of, random_map


def test_levels_of_different_width_have_no_common_table() -> None:
    with pytest.raises(ValueError, match="same channels on every level"):
        FeatureTable.from_maps(maps_of(random_map(channels=2), random_map(channels=3), strides=(1.0, 2.0)))


def test_a_table_made_in_inference_mode_can_be_differentiated_later() -> None:
    with torch.inference_mode():
        table = FeatureTable.from_maps(maps_of(random_map() + 0))
    boxes = torch.tensor([[1.2, 2.3, 9.8, 7.1]], requires_grad=True)
    prroi_pool(table, boxes).sum().backward()
    assert boxes.grad is not None
    assert boxes.grad.any()


def channels_last(feature: Tensor) -> Tensor:
    return feature.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("images", [1, 3])
def test_one_level_in_channels_last_memory_is_not_copied(images: int) -> None:
    feature = random_map(images=images)
    last = channels_last(feature)
    cells = FeatureTable.from_maps(maps_of(last)).cells
    assert cells.data_ptr() == last.data_ptr()
    assert torch.equal(cells, FeatureTable.from_maps(maps_of(feature)).cells)
    boxes, index = torch.tensor([[1.2, 2.3, 9.8, 7.1]]).repeat(images, 1), torch.arange(images)
    for one, other in zip(*(prroi_pool(maps_of(f), boxes, image_index=index) for f in (feature, last)), strict=True):
        assert torch.equal(one, other)
    with torch.inference_mode():  # but a map that an ascent could not use is
        table = FeatureTable.from_maps(maps_of(channels_last(feature) + 0))
    prroi_pool(table, boxes.requires_grad_(), image_index=index).sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_narrowing_on_the_way_is_a_convolution_before(layout: torch.memory_format, images: int) -> None:
    levels = [random_map(6, 9, 5, images), random_map(3, 4, 7, images, seed=1)]
    layers = [torch.nn.Conv2d(level.shape[1], 4, 1) for level in levels]
    maps = maps_of(*(level.contiguous(memory_format=layout) for level in levels), strides=(1.0, 2.0))
    narrow = [(layer.weight.flatten(1), layer.bias) for layer in layers]
    convolved = [layer(level) for layer, level in zip(layers, levels, strict=True)]
    expected = FeatureTable.from_maps(maps_of(*convolved, strides=(1.0, 2.0)))
    learning = FeatureTable.from_maps(maps, narrow)
    with torch.no_grad():
        frozen = FeatureTable.from_maps(maps, narrow)
    for table in (learning, frozen):
        for field in ("cells", "sizes", "offsets", "strides"):
            torch.testing.assert_close(getattr(table, field), getattr(expected, field))
    assert not frozen.cells.requires_grad
    if not images:
        return
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    upstream = torch.randn_like(expected.cells)
    slopes = (torch.autograd.grad(table.cells, weights, upstream) for table in (learning, expected))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_making_a_table_keeps_the_grad_mode() -> None:
    features = maps_of(random_map().requires_grad_())
    assert FeatureTable.from_maps(features).cells.requires_grad
    with torch.no_grad():
        assert not FeatureTable.from_maps(features).cells.requires_grad


def test_tables_join_with_maps_of_their_own_size() -> None:
    one, two = random_map(6, 9, 2), random_map(11, 4, 2, seed=1)
    both = FeatureTable.concat([FeatureTable.from_maps(maps_of(one)), FeatureTable.from_maps(maps_of(two))])
    box = torch.tensor([[0.7, 0.9, 3.5, 5.5]])
    for image, feature in enumerate((one, two)):
        alone = prroi_pool(maps_of(feature), box)
        assert torch.equal(prroi_pool(both, box, image_index=torch.tensor([image])), alone)
    with pytest.raises(ValueError, match="equally many levels"):
        FeatureTable.concat([both, FeatureTable.from_maps(maps_of(one, one, strides=(1.0, 2.0)))])


def test_levels_follow_the_rule_of_fpn() -> None:
    sides = torch.tensor([1.0, 111, 112, 223, 224, 447, 448, 9000])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    assert assign_levels(boxes, (4.0, 8.0, 16.0, 32.0)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert assign_levels(torch.tensor([[5.0, 5, 5, 5], [9.0, 9, 1, 1]]), (4.0, 8.0)).tolist() == [0, 0]
    assert assign_levels(torch.zeros(0, 4), (4.0, 8.0)).shape == (0,)
