"""The notebooks of `examples/` run from top to bottom; their stored output has no warnings and no paths of a machine."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.examples.helpers.scripts import EXAMPLES

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells_with_output(notebook):
    """Return the numbers of the cells that print."""
    cells = enumerate(notebook.cells)
    return [index for index, cell in cells if any(one.get("name") == "stdout" for one in cell.get("outputs", []))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    stored = cells_with_output(notebook)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises for a cell that raises; the cells assert what they show
    assert cells_with_output(notebook) == stored, "store the output of the notebook's current cells"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_no_path_and_no_warning(path):
    assert len(NOTEBOOKS) == 2
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            assert output["output_type"] == "stream" and output["name"] == "stdout", output
            assert not re.search(r"(/home|/root|/tmp|/work|/Users)/", output["text"])
