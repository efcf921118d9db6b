"""Fixtures that several test files share."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings

from arealite.inference.vllm import VLLMEngine
from arealite.testing import make_tiny_model
from tests.faults.document import MARKED, shown_by
from tests.notebooks.run import NotebookRuns, run_notebook
from tests.oracle import DEADLINE_S, Oracle
from tests.real_server import RealServer, run_server

pytest_plugins = ["arealite.testing.plugin"]

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TINY_MODELS = ("tied", "untied")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random Qwen2-shaped models with a byte tokenizer: one tied, one untied."""
    return {
        kind: make_tiny_model(tmp_path_factory.mktemp(kind), is_tied=kind == "tied")
        for kind in TINY_MODELS
    }


@pytest.fixture(scope="session", params=TINY_MODELS)
def tiny_model(request: pytest.FixtureRequest, tiny_models: dict[str, str]) -> str:
    return tiny_models[request.param]


@pytest.fixture(scope="session", autouse=True)
def starting_servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[RealServer]]]:
    """A real server of each tiny model that the selected tests ask for, by the model.

    They start before the first test, beside the tests that need none: it takes them a minute.
    """
    kinds = selected(request.session, "tiny_model")
    models = request.getfixturevalue("tiny_models") if kinds else {}
    with ExitStack() as stack, ThreadPoolExecutor(len(TINY_MODELS)) as pool:

        def start(model: str) -> RealServer:
            return stack.enter_context(run_server(model, tmp_path_factory.mktemp("server")))

        yield {models[kind]: pool.submit(start, models[kind]) for kind in kinds}


@pytest.fixture(scope="session", autouse=True)
def running_notebooks(request: pytest.FixtureRequest) -> Iterator[NotebookRuns]:
    """Runs of the notebooks whose tests are selected, one by one, beside the tests of no faults."""
    pool = ThreadPoolExecutor(1)
    try:
        names = selected(request.session, "notebook")
        yield {name: pool.submit(run_notebook, name) for name in names}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def vllm_server(tiny_model: str, starting_servers: dict[str, Future[RealServer]]) -> RealServer:
    return starting_servers[tiny_model].result()


def parameter_of(item: pytest.Item, name: str) -> str:
    """What the test was given under this name; empty: nothing."""
    call = getattr(item, "callspec", None)
    return call.params.get(name, "") if call else ""


def selected(session: pytest.Session, name: str) -> list[str]:
    """What the selected tests are given under this name, sorted."""
    return sorted(filter(None, {parameter_of(item, name) for item in session.items}))


def turn(item: pytest.Item) -> int:
    """Servers have the time to start: faults, whose oracle waits for them, come after the rest."""
    if parameter_of(item, "tiny_model"):
        return 2
    is_late = (
        item.get_closest_marker("fault")
        or parameter_of(item, "notebook")
        or "all_started" in getattr(item, "fixturenames", ())
    )
    return 1 if is_late else 0


@pytest.fixture
def engine(vllm_server: RealServer) -> Iterator[VLLMEngine]:
    with VLLMEngine([vllm_server.address], vllm_server.cfg) as engine:
        yield engine


@pytest.fixture(scope="session")
def all_started(
    starting_servers: dict[str, Future[RealServer]], running_notebooks: NotebookRuns
) -> None:
    """Nothing starts beside the test any more that an oracle would take for its doing."""
    wait([*starting_servers.values(), *running_notebooks.values()])


@pytest.fixture
def oracle(request: pytest.FixtureRequest, all_started: None) -> Iterator[Oracle]:
    """Judges a test in five parts when all of it, and what its other fixtures started, is over."""
    is_soak = request.node.get_closest_marker("soak") is not None
    with Oracle(deadline_s=900 if is_soak else DEADLINE_S) as oracle:
        yield oracle


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def judge_every_fault(request: pytest.FixtureRequest) -> None:
    """Let a test that is marked with a fault have the oracle, before all other fixtures."""
    if request.node.get_closest_marker("fault"):
        request.getfixturevalue("oracle")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    config.stash[MARKED] = shown_by(items)  # before any of them is deselected
    yield
    items.sort(key=turn)  # after pytest has put those together that share a server
