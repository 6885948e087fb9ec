"""What a test needs and a machine may lack: there it is, or the test is skipped in words.

Every reason starts with :data:`ABSENT`, so that a run where nothing may be absent can refuse these skips (conftest.py).
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.kit.paths import SHARED

ABSENT = "absent: "
FRAMEWORKS = "bash scripts/install_frameworks.sh"
DEV = "pip install -e '.[dev]'"


def needs_package(module: str, *, install: str = FRAMEWORKS) -> Any:
    """The imported ``module``, or a skip if its package is not installed. A package that is there and broken fails."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{ABSENT}{package} is not installed ({install})")
    return importlib.import_module(module)


def needs_shared() -> Path:
    """The folder of real images and models, or a skip if it is not there."""
    if not all((SHARED / part).is_dir() for part in ("data", "models")):
        pytest.skip(f"{ABSENT}the shared data, no folders data and models in {SHARED} (set IOU_REFINER_SHARED)")
    return SHARED
