"""What every test file gets: one thread, a fixed seed, hypothesis without deadlines, the folder of shared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Built on the profile in force, so that hypothesis's own settings for CI stay; shared machines make deadlines flaky.
settings.register_profile("iou-refiner", settings(), deadline=None)
settings.load_profile("iou-refiner")

# The tensors of the tests are small: more threads would only wait for each other, and sum in another order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and models, beside the checkout or where IOU_REFINER_SHARED says; else a skip."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("IOU_REFINER_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data: no folder {folder} (set IOU_REFINER_SHARED to where it is)")
    return folder
