"""What the tests of faults break: scripted servers, proxies in front of them, and clients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from arealite import dist
from arealite.config import parse
from arealite.inference import monitor
from arealite.inference.server import ServerConfig
from arealite.inference.vllm import VLLMEngine
from arealite.rewards import pool as rewards
from arealite.rewards.pool import RewardPool
from arealite.testing import FaultProxy, ScriptedServer
from recipes.gsm8k_grpo import Config, main
from tests.faults.training import VOCAB_SIZE


@pytest.fixture
def server(scripted_server: Callable[..., ScriptedServer]) -> ScriptedServer:
    """A server whose tokens the workflow's tokenizer knows."""
    return scripted_server(vocab_size=VOCAB_SIZE, tokens_per_s=400)


@pytest.fixture
def other_server(scripted_server: Callable[..., ScriptedServer]) -> ScriptedServer:
    """One more, which samples the same."""
    return scripted_server(vocab_size=VOCAB_SIZE, tokens_per_s=400)


@pytest.fixture
def proxy(server: ScriptedServer, fault_proxy: Callable[..., FaultProxy]) -> FaultProxy:
    """In front of `server`."""
    return fault_proxy(server.address)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., VLLMEngine]]:
    """A client of servers and proxies, with any setting of `ServerConfig`; closed in the end."""
    for interval in ("PROBE_EVERY_S", "SYNC_AGAIN_S"):  # shorter than in a run
        monkeypatch.setattr(monitor, interval, 0.2)
    with ExitStack() as stack:

        def connect_to(*servers: ScriptedServer | FaultProxy, **settings: float) -> VLLMEngine:
            cfg = ServerConfig(**settings)  # type: ignore[arg-type]
            return stack.enter_context(VLLMEngine([server.address for server in servers], cfg))

        yield connect_to


@pytest.fixture
def start_recipe(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs the recipe in this process, with settings such as `steps=3`."""

    def start(*settings: str) -> None:
        main(parse(Config, [f"out_dir={tmp_path}/run", *settings]))

    yield start
    dist.close()


@pytest.fixture
def reward_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RewardPool]]:
    """Gives the run a pool with other limits; closed in the end."""
    with ExitStack() as stack:

        def use(**settings: float) -> RewardPool:
            pool = stack.enter_context(RewardPool(**settings))  # type: ignore[arg-type]
            monkeypatch.setattr(rewards, "_default", pool)
            return pool

        yield use
