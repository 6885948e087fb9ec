"""``iou-refiner info``."""

from __future__ import annotations

from pathlib import Path

from iou_refiner.cli.exit_codes import OK
from iou_refiner.cli.options import Quiet


def info(head: Path, *, console: Quiet) -> int:
    """What a head file says about itself: its architecture, its detector, its training, recommended settings.

    Parameters
    ----------
    head
        Head made by `train`.
    """
    from iou_refiner.head.checkpoint import describe_head

    about = describe_head(head)
    architecture, metadata = dict(about["architecture"]), about["metadata"]
    sections = {
        "architecture": {**architecture, **architecture.pop("config")},
        "detector": {"name": metadata["detector_name"], "fingerprint": metadata["fingerprint"]},
        **{name: metadata[name] for name in ("training", "metrics", "recommended")},
    }
    lines = [f"{name}\n" + "\n".join(f"  {k}: {v}" for k, v in part.items()) for name, part in sections.items()]
    console.data(sections | {"trials": metadata["trials"]}, "\n".join(lines))
    return OK
