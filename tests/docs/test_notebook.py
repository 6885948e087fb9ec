"""The notebook runs from top to bottom, offline, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.needs import needs_package
from tests.kit.paths import ROOT

INSTALL = "pip install -e '.[notebook]'"
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
# Drawn and trained in seconds: the notebook's own words hold for any numbers.
SMALL = """
from functools import partial
from iou_refiner.demo import run
run.Budget = partial(
    run.Budget, train_images=24, head_images=12, test_images=16, detector_steps=60, head_epochs=1
)
"""


def test_it_runs_and_shows_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat = needs_package("nbformat", install=INSTALL)
    nbclient = needs_package("nbclient", install=INSTALL)
    needs_package("ipykernel", install=INSTALL)
    needs_package("pandas", install=INSTALL)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<progress" in html for html in shown)
    assert sum("95 % interval" in html for html in shown) == 3  # the demo, evaluate, evaluate without a detector
    assert (tmp_path / "demo" / "report.html").exists()
    assert all(output.output_type != "error" for output in outputs)


def test_it_is_kept_without_outputs():
    """What is shown is made by the reader's own machine; a change of the text is a change of the file, and no more."""
    nbformat = needs_package("nbformat", install=INSTALL)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []
    assert {cell.execution_count for cell in notebook.cells if cell.cell_type == "code"} == {None}
