"""Every notebook runs from top to bottom, with a real server."""

import asyncio
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def outcomes() -> dict[Path, BaseException | None]:
    """What each notebook ended with. They run at the same time: each waits for its server."""

    async def run_all() -> list[BaseException | None]:
        return await asyncio.gather(*map(run, NOTEBOOKS), return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        return dict(zip(NOTEBOOKS, asyncio.run(run_all()), strict=True))


async def run(path: Path) -> None:
    client = NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    await client.async_execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebook_runs_from_top_to_bottom(path: Path, outcomes: dict[Path, BaseException | None]):
    cells = nbformat.read(path, as_version=4).cells
    assert all(not cell.get("outputs") for cell in cells), "strip it with nbstripout"
    if failure := outcomes[path]:
        raise failure
