"""One self-contained HTML file from the facts: templates, escaped throughout, nothing fetched, nothing run but its own.

File names and names of categories come from strangers. They are values in the templates, never part of one, and jinja2
escapes them; a policy in the page forbids the browser to fetch anything, and to run any script but the one below.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from iou_refiner import __version__
from iou_refiner.checks import require, shown
from iou_refiner.coco import GroundTruth
from iou_refiner.evaluation.ap import CategoryAP, points
from iou_refiner.reporting.charts import HEIGHT, WIDTH, calibration_plot, curve_plot, error_bars, fit_plot, whiskers
from iou_refiner.reporting.facts import THRESHOLDS, Facts
from iou_refiner.reporting.gallery import Galleries

_TEMPLATES = Path(__file__).parent / "templates"
_MANY_CLASSES = 12  # above which only those that changed most are shown at once
_GROUPS = (
    ("By IoU threshold", ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")),
    ("By size of the object", ("APs", "APm", "APl")),
    ("Recall", ("AR",)),
)
_MEANINGS = {
    "AP": "mean of .50 to .95", "AP50": "a loose box is enough", "AP75": "the box must fit", "AP90": "nearly exact",
    "APs": "below 32² pixels", "APm": "32² to 96²", "APl": "above 96²", "AR": "objects found, mean of .50 to .95",
}  # fmt: skip


def render(facts: Facts, galleries: Galleries | None, ground_truth: GroundTruth, names: tuple[str, str]) -> str:
    """The whole page.

    Args:
        facts: what it states.
        galleries: None where there are no images.
        ground_truth: the annotation, for the names of the categories.
        names: of the two files.

    Raises:
        MissingPackageError: jinja2 is missing.
    """
    templates = environment()
    script = (_TEMPLATES / "script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = templates.get_template("page.html.j2").render(
        facts=facts,
        galleries=galleries,
        names=names,
        version=__version__,
        # The template is the one place that may be trusted to hold markup; its script stands in it byte by byte.
        script=require("markupsafe", extra="report", purpose="The report").Markup(script),
        digest=digest,
        groups=_groups(facts),
        classes=_classes(facts, ground_truth),
        **_plots(facts),
    )
    return page


def environment(*folders: Path) -> Any:
    """What renders the templates of the report, and of further folders: all text escaped, numbers by filters.

    Raises:
        MissingPackageError: jinja2 is missing.
    """
    jinja2 = require("jinja2", extra="report", purpose="The report")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"points": points, "shown": shown, "percent": _percent, "fixed": _fixed}
    return made


def _plots(facts: Facts) -> dict[str, Any]:
    """The figures; None for a calibration that cannot be had."""
    before, after = facts.before, facts.after
    calibration = before.calibration and after.calibration and (before.calibration, after.calibration)
    return {
        "width": WIDTH,
        "plot_height": HEIGHT,
        "thresholds": THRESHOLDS,
        "curve": curve_plot(facts),
        "bars": error_bars(before.errors, after.errors),
        "fits": [(fit, fit_plot(fit)) for fit in (*before.fits, *after.fits)],
        "calibration": calibration_plot(*calibration) if calibration else None,
    }


def _groups(facts: Facts) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of the table of AP: name, meaning, the four numbers, and the strip with the interval."""
    comparison = facts.comparison
    table = {row[0]: row[1:] for row in comparison.rows()}
    names = [name for _, group in _GROUPS for name in group]
    strips = dict(
        zip(
            names,
            whiskers([(comparison.differences[name], comparison.intervals[name]) for name in names]),
            strict=True,
        )
    )
    return [
        (
            title,
            [
                {
                    "name": name,
                    "meaning": _MEANINGS.get(name, ""),
                    "numbers": table[name],
                    "strip": strips[name],
                    "sign": _sign(*comparison.intervals[name]),
                }
                for name in group
            ],
        )
        for title, group in _GROUPS
    ]


def _sign(low: float, high: float) -> str:
    """What an interval says: "up", "down", or "" for either."""
    return "up" if low > 0 else "down" if high < 0 else ""


def _classes(facts: Facts, ground_truth: GroundTruth) -> dict[str, Any]:
    """AP of each class that has objects, the largest gain first, and those to be shown at once."""
    names = {category.id: shown(category.name) for category in ground_truth.categories}
    pairs: list[tuple[CategoryAP, CategoryAP]] = list(
        zip(facts.comparison.before.categories, facts.comparison.after.categories, strict=True)
    )
    rows = [(names[old.id], old.ap, new.ap, new.ap - old.ap) for old, new in pairs if old.ap == old.ap]
    rows.sort(key=lambda row: -row[3])
    half = _MANY_CLASSES // 2
    first = rows if len(rows) <= _MANY_CLASSES else [*rows[:half], *rows[-half:]]
    return {"all": rows, "first": first}


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.0%}"


def _fixed(value: float, digits: int = 2) -> str:
    return "-" if value != value else f"{value:.{digits}f}"
