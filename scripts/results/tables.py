"""The tables of docs/, from the records in docs/results.

    python -m scripts.results.tables          # rewrites what stands between the marks
    python -m scripts.results.tables --check  # fails if a document says something else than the records

``<!-- ablation NAME DETECTOR -->`` to ``<!-- end -->`` holds the rows of an ablation: means over seeds, with the
standard deviation where there are several. ``<!-- gain NAME -->`` holds docs/results/NAME.json, which ``python -m
scripts.results.gain --json`` wrote, ``<!-- siblings NAME -->`` one that ``python -m scripts.results.siblings --json``
wrote, and ``<!-- bench NAME OTHER -->`` two of ``python -m scripts.bench --json``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable
from typing import Any

from scripts.ablations.records import Records, Row, value_of
from scripts.paths import RESULTS, ROOT

RECORDS = Records()
DOCUMENTS = tuple(ROOT / "docs" / name for name in ("gains.md", "siblings.md", "accuracy.md", "performance.md"))
_MARKED = re.compile(r"(<!-- (ablation|gain|siblings|bench) ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Heading, where the figure stands in a row, factor, decimals.
Column = tuple[str, str, float, int]
_TRAINED: tuple[Column, ...] = (
    ("Pearson: IoU", "pearson", 1, 3),
    ("ranking", "pearson_ranking", 1, 3),
    ("regression: gain", "regression.gain", 100, 1),
    ("worse %", "regression.worse", 100, 0),
    ("ascent: gain", "ascent.gain", 100, 1),
    ("worse %", "ascent.worse", 100, 0),
    ("AP ranked", "ranked.AP", 1, 1),
    ("and moved", "moved.AP", 1, 1),
    ("its AP50", "moved.AP50", 1, 1),
    ("AP90", "moved.AP90", 1, 1),
)
_COST: Column = ("ms / 1,000 boxes", "ms_per_1000_boxes", 1, 0)
_STAGE: tuple[Column, ...] = tuple((name, f"stage.{name}", 1, 1) for name in ("AP", "AP50", "AP75", "AP90"))
_BY_SIZE: tuple[Column, ...] = tuple((name, f"stage.{name}", 1, 1) for name in ("APs", "APm", "APl"))
_DETECTOR: tuple[Column, ...] = (
    *((metric, f"own.{metric}", 1.0, 1) for metric in ("AP", "AP50", "AP90")),
    *((f"{metric} with the stage", f"moved.{metric}", 1.0, 1) for metric in ("AP", "AP50", "AP90")),
    ("ΔAP", "gain.AP", 100, 1),
    ("from", "gain.low", 100, 1),
    ("to (95 %)", "gain.high", 100, 1),
    ("Pearson: class score", "pearson_score", 1, 3),
    ("IoU", "pearson", 1, 3),
)
_COLUMNS = {
    "trunk": (*_TRAINED, _COST),
    "ascent": _STAGE,
    "scores": _STAGE,
    "ceilings": _STAGE + _BY_SIZE,
    "detector": _DETECTOR,
}
_GAIN_AT = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")


def cell(rows: Iterable[Row], column: Column) -> str:
    """Mean and standard deviation over seeds."""
    _, path, factor, decimals = column
    values = [factor * value for row in rows if (value := value_of(row, path)) is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(set(values)) > 1 else mean


def ablation(name: str, detector: str) -> str:
    """What was measured of each variant of an ablation."""
    columns = _COLUMNS.get(name, _TRAINED)
    variants = RECORDS.by_variant(name, detector)
    body = [[variant, *(cell(rows, column) for column in columns)] for variant, rows in variants.items()]
    return markdown(["", *(heading for heading, *_ in columns)], body)


def gain(name: str) -> str:
    """What each part of the stage adds to a detector."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    heading = ["", *_GAIN_AT, "ΔAP [95 %]", "ΔAP50", "ΔAP90"]
    body = []
    for variant, row in rows.items():
        values = [f"{100 * row['after']['metrics'][metric]:.1f}" for metric in _GAIN_AT]
        changes = ["" if variant == "detector" else change(row, metric) for metric in ("AP", "AP50", "AP90")]
        body.append([f"**{variant}**" if variant == "as chosen on val" else variant, *values, *changes])
    return markdown(heading, body)


def siblings(name: str) -> str:
    """What a network over siblings adds to saved candidates."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    metrics = ("AP", "AP50", "AP75", "AP90")
    body = [
        [
            variant, *(f"{100 * row['after']['metrics'][metric]:.1f}" for metric in metrics),
            *("" if variant == "greedy NMS" else change(row, metric) for metric in metrics),
            f"{1000 * row['cpu_seconds']:.0f}",
        ]
        for variant, row in rows.items()
    ]  # fmt: skip
    return markdown(["", *metrics, "ΔAP [95 %]", "ΔAP50", "ΔAP75", "ΔAP90", "CPU ms / image"], body)


def change(row: dict[str, Any], metric: str) -> str:
    """The difference of a metric in points, with its interval."""
    low, high = row["intervals"][metric]
    return f"{100 * row['differences'][metric]:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def bench(name: str, other: str) -> str:
    """How fast we are beside what would be used otherwise, in one run and the ratios of another."""
    first, second = (json.loads((RESULTS / f"{run}.json").read_text()) for run in (name, other))
    again = {row["name"]: row["ratio"] for row in second["rows"]}
    body = [
        [
            row["name"], row["peer"], f"{row['ours_ms']:.1f}", f"{row['peer_ms']:.1f}", f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}", f"{again[row['name']]:.3f}", f"{row['limit']:g}",
            "met" if max(row["ratio"], again[row["name"]]) <= row["limit"] else "**missed**",
        ]
        for row in first["rows"]
    ]  # fmt: skip
    return markdown(
        ["work", "against", "ours, ms", "theirs, ms", "ratio", "10 to 90 %", "second run", "limit", ""], body
    )


def markdown(heading: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, figures to the right."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def filled(document: str) -> str:
    """A document with every marked table made anew."""
    make = {"ablation": ablation, "gain": gain, "siblings": siblings, "bench": bench}
    return _MARKED.sub(lambda mark: mark[1] + make[mark[2]](*mark[3].split()) + mark[4], document)


def main() -> None:
    for path in DOCUMENTS:
        before = path.read_text()
        after = filled(before)
        if "--check" in sys.argv and after != before:
            sys.exit(f"{path.name} and the records in docs/results disagree. Run: python -m scripts.results.tables")
        path.write_text(after)


if __name__ == "__main__":
    main()
