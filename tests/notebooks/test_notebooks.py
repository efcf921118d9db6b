"""Every notebook runs from top to bottom, with the real server that it starts, if any."""

import nbformat
import pytest

from tests.notebooks.run import NOTEBOOKS, NotebookRuns


@pytest.mark.parametrize("notebook", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
def test_notebook_runs_from_top_to_bottom(notebook: str, running_notebooks: NotebookRuns):
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    assert all(not cell.get("outputs") for cell in cells), "strip it with nbstripout"
    done = running_notebooks[notebook].result()
    assert done.returncode == 0, done.stderr[-3000:]
