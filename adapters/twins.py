"""What the adapters of live detectors share: copies that share every weight."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def shallow(module: nn.Module, **changes: Any) -> Any:
    """A copy that shares all weights and submodules, with some attributes or submodules exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin
