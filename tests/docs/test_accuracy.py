"""The tables of the documents say what the records say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.kit.paths import ROOT


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "results" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_that_of_its_record(tables: ModuleType) -> None:
    for path, least in zip(tables.DOCUMENTS, (3, 7, 1), strict=True):
        document = path.read_text()
        assert len(tables._MARKED.findall(document)) == document.count("<!-- end -->") >= least
        assert tables.filled(document) == document


def test_a_cell_is_the_mean_over_seeds_and_its_spread(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "scores", "detector": "d", "variant": variant, "seed": seed, "stage": {"AP": ap, "AP50": 40.0}}
        for variant, seed, ap in (("a", 0, 20.0), ("b", 0, 21.0), ("a", 1, 22.0))
    ]
    rows.append({**rows[0], "detector": "other", "stage": {"AP": 99.0}})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "ROWS", tmp_path / "rows.jsonl")
    document = "before\n<!-- table scores d -->\nold\n<!-- end -->\nafter\n"
    lines = tables.filled(document).splitlines()
    assert lines[:2] == ["before", "<!-- table scores d -->"]
    assert lines[4:] == ["| a | 21.0 ± 1.4 | 40.0 |  |  |", "| b | 21.0 | 40.0 |  |  |", "<!-- end -->", "after"]
    assert tables.filled("\n".join(lines) + "\n") == "\n".join(lines) + "\n"
