"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest

from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
from tests.faults.document import MARKED, shown_by
from tests.oracle import DEADLINE_S, Oracle
from tests.real_server import RealServer, run_server

pytest_plugins = ["arealite.testing.plugin"]


@pytest.fixture(scope="session", params=["tied", "untied"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2-shaped model with a byte tokenizer; once tied, once untied."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_tiny_model(folder, is_tied=request.param == "tied")


@pytest.fixture(scope="session")
def vllm_server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A real server of the tiny model."""
    run_dir, token_dir = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("token")
    with run_server(tiny_model, run_dir, token_dir / "token") as server:
        yield server


@pytest.fixture
def engine(vllm_server: RealServer) -> Iterator[VLLMEngine]:
    with VLLMEngine([vllm_server.address], vllm_server.cfg) as engine:
        yield engine


@pytest.fixture
def oracle(request: pytest.FixtureRequest) -> Iterator[Oracle]:
    """Judges a test in five parts when all of it, and what its other fixtures started, is over."""
    is_soak = request.node.get_closest_marker("soak") is not None
    with Oracle(deadline_s=900 if is_soak else DEADLINE_S) as oracle:
        yield oracle


@pytest.fixture(autouse=True)
def judge_every_fault(request: pytest.FixtureRequest) -> None:
    """Let a test that is marked with a fault have the oracle, before all other fixtures."""
    if request.node.get_closest_marker("fault"):
        request.getfixturevalue("oracle")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[MARKED] = shown_by(items)  # before any of them is deselected
