"""The detector of examples/custom_adapter.py as a case of the contract: one that no installed adapter knows."""

from __future__ import annotations

from collections.abc import Callable

from examples import custom_adapter
from tests.adapters.case import Case, noise


class CustomCase(Case):
    """The example's detector is a plain torch module."""

    package, replaced = "torch", "the detector's call"


CASES: dict[str, Callable[[], Case]] = {
    "centers": lambda: CustomCase(custom_adapter.adapter(), noise((70, 110), (90, 64), (200, 150))),
}
