from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from iou_refiner.pooling.cuda_kernels import Variant
from tests.pooling.cuda_host.host import CONTRACT, COUNT_LOADS, NO_CONTRACT, Library, variants

OUTPUT_SIZES = (1, 3, 5, 7, 14)


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Every variant, with multiply-adds fused wherever the language allows, as on the GPU; it counts its loads."""
    folder: Path = tmp_path_factory.mktemp("fused")
    return Library(folder, variants(*OUTPUT_SIZES), flags=CONTRACT, faults=COUNT_LOADS)


@pytest.fixture(scope="session")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Every variant whose geometry differs, with no multiply-add fused but those the kernels ask for."""
    chosen = [Variant(torch.float32, size, 4) for size in OUTPUT_SIZES]
    chosen += [Variant(torch.float32, 7, 1), Variant(torch.float16, 7, 8), Variant(torch.bfloat16, 7, 8)]
    return Library(tmp_path_factory.mktemp("unfused"), chosen, flags=NO_CONTRACT)


@pytest.fixture
def on_host(fused: Library) -> Iterator[Library]:
    """The functions of ``iou_refiner.pooling.cuda_kernels`` take CPU tensors and run on the host."""
    with fused.installed():
        yield fused
