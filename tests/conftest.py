"""What every test file gets: one thread, a fixed seed, hypothesis without deadlines, the folder of shared data."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.kit.paths import SHARED

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
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data: no folder {SHARED} (set IOU_REFINER_SHARED to where it is)")
    return SHARED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the adapter contract measured, case by case."""
    measured = getattr(sys.modules.get("tests.adapters.case"), "MEASURED", {})
    if not measured:
        return
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    terminalreporter.section("adapters against their frameworks")
    for name, case in measured.items():
        seconds = sum(report.duration for report in reports if report.nodeid.endswith(f"{name}]"))
        errors = [f"{case.measured[what]:.1e}" if what in case.measured else "-" for what in ("parity", "geometry")]
        framework = f"{case.package} {version(case.package)}"
        terminalreporter.write_line(
            f"{name:34} {framework:24} parity {errors[0]:>8}  geometry {errors[1]:>8} px  {seconds:5.1f} s  "
            f"replaced: {case.replaced}"
        )
