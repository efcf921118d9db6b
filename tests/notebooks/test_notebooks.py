"""Every notebook runs from top to bottom, with the real server that it starts, if any."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> dict[str, Future[None]]:
    """Those that are asked for, all at the same time: each waits for its server."""
    wanted = [path for path in NOTEBOOKS if any(_runs(path, i) for i in request.session.items)]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        return {path.stem: pool.submit(run, path) for path in wanted}


def _runs(path: Path, item: pytest.Item) -> bool:
    return item.path == Path(__file__) and f"[{path.stem}]" in item.name


def run(path: Path) -> None:
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    asyncio.run(client.async_execute())  # its own execute() leaves its event loop open


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook_runs_from_top_to_bottom(path: Path, runs: dict[str, Future[None]]):
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.get("outputs") for cell in cells), "strip it with nbstripout"
    runs[path.stem].result()
