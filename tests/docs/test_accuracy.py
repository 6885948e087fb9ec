"""The tables of the documents say what the records say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.ablations.records import Records
from scripts.results import tables


def test_every_table_is_that_of_its_record() -> None:
    for path, least in zip(tables.DOCUMENTS, (3, 1, 7, 1), strict=True):
        document = path.read_text()
        assert len(tables._MARKED.findall(document)) == document.count("<!-- end -->") >= least
        assert tables.filled(document) == document


def test_a_cell_is_the_mean_over_seeds_and_its_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [
        {"ablation": "scores", "detector": "d", "variant": variant, "seed": seed, "stage": {"AP": ap, "AP50": 40.0}}
        for variant, seed, ap in (("a", 0, 20.0), ("b", 0, 21.0), ("a", 1, 22.0))
    ]
    rows.append({**rows[0], "detector": "other", "stage": {"AP": 99.0}})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "RECORDS", Records(tmp_path / "rows.jsonl"))
    document = "before\n<!-- ablation scores d -->\nold\n<!-- end -->\nafter\n"
    lines = tables.filled(document).splitlines()
    assert lines[:2] == ["before", "<!-- ablation scores d -->"]
    assert lines[4:] == ["| a | 21.0 ± 1.4 | 40.0 |  |  |", "| b | 21.0 | 40.0 |  |  |", "<!-- end -->", "after"]
    assert tables.filled("\n".join(lines) + "\n") == "\n".join(lines) + "\n"
