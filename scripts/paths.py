"""Where the scripts find and leave things. Imports no torch."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: The records that the tables and figures of the documents are made from.
RESULTS = ROOT / "docs" / "results"
