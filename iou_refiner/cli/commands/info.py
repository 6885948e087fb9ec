"""``iou-refiner info``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    config, siblings = architecture.pop("config", {}), architecture.pop("siblings", None)
    sections = {
        "architecture": architecture | config,
        "siblings": siblings or {},
        "detector": {name: metadata.get(key, "") for name, key in _DETECTOR.items()},
        **{name: metadata.get(name) or {} for name in ("training", "metrics", "recommended")},
    }
    categories, trials = metadata.get("categories") or [], metadata.get("trials") or []
    lines = [f"{name}\n" + "\n".join(f"  {k}: {v}" for k, v in part.items()) for name, part in sections.items()]
    lines.append("categories\n" + "\n".join(_category(category) for category in categories or [None]))
    lines.append("\n".join(["trials on val, AP and AP50", *_trials(trials)]))
    console.data(sections | {"categories": categories, "trials": trials}, "\n".join(lines))
    return OK


_DETECTOR = {"name": "detector_name", "fingerprint": "fingerprint"}


def _category(category: Mapping[str, Any] | None) -> str:
    if category is None:
        return "  not recorded: the head takes all"
    return f"  {category['id']}: {category['name']} (label {category['label']})"


def _trials(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each trial: what it measured, and which settings differ from those of the first."""
    rows = []
    for trial in trials:
        differing = [f"{k} {v}" for k, v in trial.items() if k not in ("AP", "AP50") and v != trials[0].get(k)]
        measured = "".join(f"{_points(trial.get(name)):>6}" for name in ("AP", "AP50"))
        rows.append(f"{measured}  {', '.join(differing) or 'the first settings'}")
    return rows or ["  none: train with --val-ann"]


def _points(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else "-"
