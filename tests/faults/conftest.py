"""What the tests of faults break: scripted servers, proxies in front of them, and clients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from arealite.inference import monitor
from arealite.inference.server import ServerConfig
from arealite.inference.vllm import VLLMEngine
from arealite.rewards import pool as rewards
from arealite.rewards.pool import RewardPool
from arealite.testing import FaultProxy, ScriptedServer
from arealite.testing.plugin import fault_proxy, scripted_server
from tests.faults.training import VOCAB_SIZE

__all__ = ["fault_proxy", "scripted_server"]


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
    monkeypatch.setattr(monitor, "SYNC_AGAIN_S", 0.2)  # a second try comes sooner than in a run
    with ExitStack() as stack:

        def connect_to(*servers: ScriptedServer | FaultProxy, **settings: float) -> VLLMEngine:
            cfg = ServerConfig(**settings)  # type: ignore[arg-type]
            return stack.enter_context(VLLMEngine([server.address for server in servers], cfg))

        yield connect_to


@pytest.fixture
def reward_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RewardPool]:
    """Gives the run a pool with other limits; the oracle closes it."""

    def use(**settings: float) -> RewardPool:
        pool = RewardPool(**settings)  # type: ignore[arg-type]
        monkeypatch.setattr(rewards, "_default", pool)
        return pool

    return use
