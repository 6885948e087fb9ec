"""Fixtures of several folders: a test file takes one by ``scene = fixtures.scene``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from iou_refiner import HeadConfig, IoUHead, cli
from tests.kit.toys import ToyScene, make_scene

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> ToyScene:
    return make_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture
def head() -> IoUHead:
    """A new head for the scene."""
    return IoUHead((4, 4), (1, 2), HeadConfig(width=3, hidden=(16,), output_size=3)).eval()


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls a command in the folder that the test file's own fixture ``home`` gives: its exit code, stdout, stderr."""
    monkeypatch.chdir(home)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return call


def relabelled(scene: ToyScene, labels: int) -> ToyScene:
    """The same with boxes of the labels 1 to ``labels``, which come at random."""
    generator = torch.Generator().manual_seed(3)
    columns = [torch.randint(1, labels + 1, (len(image),), generator=generator) for image in scene.candidates]
    candidates = [image.replace(labels=column) for image, column in zip(scene.candidates, columns, strict=True)]
    return scene._replace(candidates=candidates)
