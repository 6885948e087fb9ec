"""The tables of docs/accuracy.md, from the rows of the laboratory.

    python scripts/experiments/tables.py          # rewrites what stands between the marks in docs/accuracy.md
    python scripts/experiments/tables.py --check  # fails if the document says something else than the rows

A table stands between ``<!-- table QUESTION DETECTOR -->`` and ``<!-- end -->``. Figures are means over seeds, with the
standard deviation where there are several.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS, DOCUMENT = ROOT / "docs" / "results" / "experiments.jsonl", ROOT / "docs" / "accuracy.md"
_TABLE = re.compile(r"(<!-- table (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
# Heading, where the figure stands in a row, factor, decimals.
Column = tuple[str, str, float, int]
_TRAINED: tuple[Column, ...] = (
    ("Pearson", "pearson", 1, 3),
    ("regression: gain", "regression.gain", 100, 1),
    ("worse %", "regression.worse", 100, 0),
    ("ascent: gain", "ascent.gain", 100, 1),
    ("worse %", "ascent.worse", 100, 0),
    ("AP ranked", "ranked.AP", 1, 1),
    ("+ ascent", "climbed.AP", 1, 1),
    ("+ regression", "regressed.AP", 1, 1),
    ("its AP50", "regressed.AP50", 1, 1),
    ("AP90", "regressed.AP90", 1, 1),
)
_COST: Column = ("ms / 1,000 boxes", "ms_per_1000_boxes", 1, 0)
_ASKED: tuple[Column, ...] = tuple((name, f"stage.{name}", 1, 1) for name in ("AP", "AP50", "AP75", "AP90"))
_BY_SIZE: tuple[Column, ...] = tuple((name, f"stage.{name}", 1, 1) for name in ("APs", "APm", "APl"))


def columns(question: str) -> tuple[Column, ...]:
    """What a question is answered in."""
    if question in ("ascent", "scores"):
        return _ASKED
    if question == "ceilings":
        return _ASKED + _BY_SIZE
    return (*_TRAINED, _COST) if question == "trunk" else _TRAINED


def rows_of(question: str, detector: str) -> dict[str, list[Row]]:
    """The rows of a question by variant, in the order in which they were first run."""
    found: dict[str, list[Row]] = {}
    for row in map(json.loads, ROWS.read_text().splitlines()):
        if (row["question"], row["detector"]) == (question, detector):
            found.setdefault(row["variant"], []).append(row)
    return found


def value_of(row: Row, path: str) -> float | None:
    """A figure of a row, by its path; None where the row has none."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def cell(rows: Iterable[Row], column: Column) -> str:
    """Mean and standard deviation over seeds."""
    _, path, factor, decimals = column
    values = [factor * value for row in rows if (value := value_of(row, path)) is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(set(values)) > 1 else mean


def table(question: str, detector: str) -> str:
    """A table in Markdown."""
    wanted = columns(question)
    lines = ["| " + " | ".join(["", *(heading for heading, *_ in wanted)]) + " |", "|---|" + "---:|" * len(wanted)]
    for variant, rows in rows_of(question, detector).items():
        lines.append("| " + " | ".join([variant, *(cell(rows, column) for column in wanted)]) + " |")
    return "\n".join(lines) + "\n"


def filled(document: str, make: Callable[[str, str], str] = table) -> str:
    """The document with every table made anew."""
    return _TABLE.sub(lambda found: found[1] + make(found[2], found[3]) + found[4], document)


def main() -> None:
    before = DOCUMENT.read_text()
    after = filled(before)
    if "--check" in sys.argv:
        sys.exit(0 if after == before else f"{DOCUMENT.name} and {ROWS.name} disagree. Run {Path(__file__).name}.")
    DOCUMENT.write_text(after)


if __name__ == "__main__":
    main()
