"""What every test gets: one thread, a fixed seed, hypothesis without deadlines; and what a run may not skip."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.kit.needs import ABSENT, needs_shared

# Built on the profile in force, so that hypothesis's own settings for CI stay; shared machines make deadlines flaky.
settings.register_profile("iou-refiner", settings(), deadline=None)
settings.load_profile("iou-refiner")

# The tensors of the tests are small: more threads would only wait for each other, and sum in another order.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--nothing-absent``: for CI, where all frameworks and data are there."""
    parser.addoption(
        "--nothing-absent", action="store_true", help="a test skipped since a framework or data is absent fails"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """With ``--nothing-absent``, a skip for something absent is a failure."""
    outcome = yield
    report = outcome.get_result()
    if not report.skipped or hasattr(report, "wasxfail") or not item.config.getoption("--nothing-absent"):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if reason.startswith(ABSENT):
        report.outcome, report.longrepr = "failed", f"--nothing-absent: {reason}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and models; else a skip."""
    return needs_shared()


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
