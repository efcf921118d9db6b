"""Fixtures that several test files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from arealite.inference.server import ServerConfig, serve
from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
from tests.faults.document import MARKED, shown_by
from tests.oracle import DEADLINE_S, Oracle

pytest_plugins = ["arealite.testing.plugin"]


@pytest.fixture(scope="session", params=["tied", "untied"])
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2-shaped model with a byte tokenizer; once tied, once untied."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_tiny_model(folder, is_tied=request.param == "tied")


@pytest.fixture(scope="session")
def vllm_address(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real vLLM server of the tiny model."""
    logs: Path = tmp_path_factory.mktemp("logs")
    with serve(tiny_model, ServerConfig(), log_dir=logs) as servers:
        yield servers.addresses[0]


@pytest.fixture
def engine(vllm_address: str) -> Iterator[VLLMEngine]:
    with VLLMEngine([vllm_address]) as engine:
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
