"""The trunk: levels mixed one after the other are levels mixed side by side."""

from __future__ import annotations

import pytest
import torch

from iou_refiner.head.trunk import Trunk

LEVELS, BOXES, BINS, CHANNELS = 3, 5, 4, 6


def test_mixing_is_one_linear_map_of_all_levels_and_channels_of_a_bin() -> None:
    trunk, pooled = Trunk(LEVELS, BINS, CHANNELS, mix=7, hidden=[]), torch.randn(LEVELS, BOXES, BINS, CHANNELS)
    assert trunk.mix is not None
    side_by_side = pooled.permute(1, 2, 0, 3).flatten(2)  # (R, bins, levels * channels)
    expected = trunk.mix(side_by_side).relu().flatten(1)
    assert trunk.out_features == expected.shape[1] == BINS * 7
    torch.testing.assert_close(trunk(pooled), expected)


def test_without_mixing_every_layer_sees_everything_level_by_level() -> None:
    trunk, pooled = Trunk(LEVELS, BINS, CHANNELS, mix=0, hidden=[]), torch.randn(LEVELS, BOXES, BINS, CHANNELS)
    assert torch.equal(trunk(pooled), pooled.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("mix", [0, 7])
@pytest.mark.parametrize("boxes", [0, 1, 5])
def test_its_gradient(mix: int, boxes: int) -> None:
    trunk = Trunk(LEVELS, BINS, CHANNELS, mix=mix, hidden=[8]).double()
    pooled = torch.randn(LEVELS, boxes, BINS, CHANNELS, dtype=torch.float64, requires_grad=True)
    assert trunk(pooled).shape == (boxes, 8)
    if boxes:
        assert torch.autograd.gradcheck(trunk, (pooled,), eps=1e-7, atol=1e-5)
