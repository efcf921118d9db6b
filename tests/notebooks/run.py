"""Runs a notebook in a process of its own, as its reader would."""

import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NotebookRuns = dict[str, Future[subprocess.CompletedProcess[str]]]


def run_notebook(name: str) -> subprocess.CompletedProcess[str]:
    """What running all its cells gave; the code is 0 if none raised."""
    command = [
        str(Path(sys.executable).with_name("jupyter-execute")),
        *(str(NOTEBOOKS / f"{name}.ipynb"), "--timeout=300", "--kernel_name=python3"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)
