"""Fixtures of several folders: a test file takes one by ``scene = fixtures.scene``."""

from __future__ import annotations

import pytest
import torch

from iou_refiner import HeadConfig, IoUHead
from tests.kit.toys import ToyScene, make_scene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ToyScene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def head() -> IoUHead:
    """A new head for the scene."""
    return IoUHead((4, 4), (1, 2), HeadConfig(width=3, hidden=(16,), output_size=3)).eval()


def relabelled(scene: ToyScene, labels: int) -> ToyScene:
    """The same with boxes of the labels 1 to ``labels``, which come at random."""
    generator = torch.Generator().manual_seed(3)
    columns = [torch.randint(1, labels + 1, (len(image),), generator=generator) for image in scene.candidates]
    candidates = [image.replace(labels=column) for image, column in zip(scene.candidates, columns, strict=True)]
    return scene._replace(candidates=candidates)
