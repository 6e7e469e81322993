"""The notebook runs from a clean kernel, offline, and what it tells its reader is so."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pte.checkpoint import load_adapter

pytestmark = pytest.mark.system

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "first_minute.ipynb"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_a_valid_notebook_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


@pytest.mark.timeout(300)
def test_a_reader_sees_forgetting_a_memory_learned_and_one_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = code_cells(notebook)
    (result,) = (output for output in cells[-1].outputs if output.output_type == "execute_result")
    results = ast.literal_eval(result.data["text/plain"])
    assert results["full cache"] == results["fresh adapter, full cache"] >= 0.95
    assert results["window"] <= 0.2 and results["window, memory zeroed"] <= 0.2
    assert results["window with memory"] >= 0.6
    assert results["largest gap"] <= 1e-3
    assert any("image/png" in output.get("data", {}) for output in cells[-2].outputs)
    tensors, metadata = load_adapter(tmp_path / "runs" / "first-minute")
    assert sum(tensor.numel() for tensor in tensors.values()) == results["saved parameters"]
    assert metadata.base_name == "embedded" and metadata.options["rank"] == 32
