"""The detector of examples/own_adapter.py as a case of the contract: one that no installed adapter knows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from tests.adapters.case import ROOT, Case, noise


def own_example() -> Any:
    """The module examples/own_adapter.py."""
    spec = importlib.util.spec_from_file_location("own_adapter", ROOT / "examples" / "own_adapter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OwnCase(Case):
    """The example's detector is a plain torch module."""

    package, replaced = "torch", "the detector's call"


CASES: dict[str, Callable[[], Case]] = {
    "centers": lambda: OwnCase(own_example().adapter(), noise((70, 110), (90, 64), (200, 150))),
}
