"""The rows of the ablations: one JSON object a line, appended when a run ends. Imports no torch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.paths import RESULTS, ROOT

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What names a row: a run with the same four values is not repeated."""

    ablation: str
    detector: str
    variant: str
    seed: int


@dataclass(frozen=True)
class Records:
    """The rows in a file, which need not exist yet."""

    path: Path = RESULTS / "ablations.jsonl"

    def rows(self) -> list[Row]:
        """All rows, in the order in which they were measured."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def by_variant(self, ablation: str, detector: str) -> dict[str, list[Row]]:
        """The rows of one ablation, one for each seed, in the order in which the variants were first run."""
        variants: dict[str, list[Row]] = {}
        for row in self.rows():
            if (row["ablation"], row["detector"]) == (ablation, detector):
                variants.setdefault(row["variant"], []).append(row)
        return variants

    def __contains__(self, run: Run) -> bool:
        return any(row["seed"] == run.seed for row in self.by_variant(run.ablation, run.detector).get(run.variant, []))

    def add(self, run: Run, seconds: float, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
        """Append what a run has measured, with the commit it was measured at."""
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        about = {"settings": settings, "seconds": round(seconds, 1), "commit": commit.stdout.strip()}
        self.append({**asdict(run), **about, **figures})

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row as it is."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def value_of(row: Row, path: str) -> float | None:
    """A figure of a row by its dotted path; None where the row has none."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
