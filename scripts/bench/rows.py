"""What is measured. A row names its work, its peer and its limit, and knows how to check its result."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator

import torch

from scripts.bench.work import Work

#: Where each group of rows is made. Imported when its turn comes, for its peer may not be installed.
GROUPS = {
    "pool": "scripts.bench.pooling:pooling",
    "refine": "scripts.bench.stage:refinement",
    "nms": "scripts.bench.suppression:suppression",
    "soft nms": "scripts.bench.soft_suppression:soft_suppression",
    "stage mobilenet": "scripts.bench.stage:on_mobilenet",
    "stage resnet": "scripts.bench.stage:on_resnet",
    "encode": "scripts.bench.pooling:encoding",
    "rescore": "scripts.bench.rescore:rescoring",
}
_OWN = ("iou_refiner", "scripts", "tests", "examples")


def rows(device: torch.device, only: str = "") -> Iterator[Work]:
    """All rows of the groups whose name holds ``only``; without those whose peer is not installed."""
    for group, place in GROUPS.items():
        if only not in group:
            continue
        try:
            yield from pkgutil.resolve_name(place)(device)
        except ImportError as error:
            if (error.name or "").startswith(_OWN):
                raise
            print(f"SKIPPED {group}: {error}", file=sys.stderr)
