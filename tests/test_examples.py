"""The notebooks in examples/ run from top to bottom, with few steps and records."""

from __future__ import annotations

import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.forked_commands.commands import ForkedCommands

FOLDER = Path(__file__).parent.parent / "examples"
FEW = {
    "fft.max_steps": 2,
    "mask_train.max_steps": 2,
    "data": "quickstart=64",
    "val_data": "quickstart/validation=8",
    "eval.limit": 4,
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working folder of both notebooks: the second reads the output of the first."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, forked_commands: ForkedCommands) -> Path:
    """An executable for the notebook's `python -m mftctl`, which forks the commands with their imports done."""
    path = tmp_path_factory.mktemp("python") / "python"
    forked = shlex.join(forked_commands.mftctl)
    path.write_text(f'#!/bin/sh\nshift 2\nexec {forked} "$@"\n')
    path.chmod(0o700)
    return path


def run(name: str, folder: Path, python: Path) -> nbformat.NotebookNode:
    """A notebook with its outputs, run with small values in its parameters cell."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"settings = {[part for key, value in FEW.items() for part in ('--set', f'{key}={value}')]}"
    parameters.source += f"\nimport sys\n\nsys.executable = {str(python)!r}"
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def outputs(notebook: nbformat.NotebookNode) -> str:
    """The text that all cells print or display."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(
        output.text
        if output.output_type == "stream"
        else output.get("data", {}).get("text/markdown", "") or output.get("data", {}).get("text/plain", "")
        for output in found
    )


@pytest.mark.slow
def test_a_mask_in_ten_minutes(folder: Path, python: Path) -> None:
    shown = outputs(run("mask_in_ten_minutes.ipynb", folder, python))
    assert (folder / "mask.bits").is_file()
    assert (folder / "better" / "model.safetensors").is_file()
    assert "of the masked weights are removed" in shown
    assert "| FFT |" in shown
    assert "| MFT |" in shown


@pytest.mark.slow
def test_a_report_in_pandas(folder: Path, python: Path) -> None:
    """Run after the notebook above, or alone on its own experiment."""
    shown = outputs(run("report_in_pandas.ipynb", folder, python))
    assert "change" in shown
    assert "tokens_per_second" in shown
    assert "exact-match-on-quickstart-test-quickstart" in shown
    assert "001-fft" in shown or "001-eval" in shown


def test_notebooks_are_committed_with_parameters_that_change_nothing() -> None:
    for path in FOLDER.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        assert "settings: list[str] = []" in parameters.source
