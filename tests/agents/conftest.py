"""Episodes that are served while a test lasts, and real OpenAI clients of them."""

import asyncio
import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from openai import OpenAI

from arealite import background
from arealite.agents import Endpoint, Episode
from arealite.api import InferenceEngine
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import ModelRequest, ModelResponse, SamplingParams, Trajectory

TOKENIZER = byte_tokenizer()
SAMPLING = SamplingParams(max_new_tokens=200)


class WatchedEngine(ScriptedEngine):
    """Tells what began, and what was cancelled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began: queue.Queue[ModelRequest] = queue.Queue()
        self.cancelled: queue.Queue[ModelRequest] = queue.Queue()

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        self.began.put(request)
        try:
            return await super().agenerate(request)
        except asyncio.CancelledError:
            self.cancelled.put(request)
            raise


class BrokenEngine(ScriptedEngine):
    """Fails with the given error so many times, and then works."""

    def __init__(
        self, error: Exception, replies: Sequence[str] = (), *, failures: int = 99
    ) -> None:
        super().__init__(replies)
        self.error = error
        self.failures = failures

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        if self.failures == 0:
            return await super().agenerate(request)
        self.failures -= 1
        raise self.error


@dataclass(frozen=True, kw_only=True)
class Served:
    """An episode and a client that has its address and key."""

    episode: Episode
    client: OpenAI

    def ask(self, messages: Sequence[Any] | str, **settings: Any) -> Any:
        """The completion of a conversation, or of one question."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.client.chat.completions.create(model="any", messages=messages, **settings)

    def trajectories(self, reward: float = 1.0) -> list[Trajectory]:
        return asyncio.run(self.episode.trajectories(reward))

    def sampled(self) -> list[str]:
        """What is trained on, as text, of each trajectory."""
        return [sampled_text(trajectory) for trajectory in self.trajectories()]


def sampled_text(trajectory: Trajectory) -> str:
    pairs = zip(trajectory.token_ids, trajectory.loss_mask, strict=True)
    return str(TOKENIZER.decode([token_id for token_id, is_sampled in pairs if is_sampled]))


Serve = Callable[..., Served]
Script = Sequence[str] | Callable[[str], str]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as endpoint:
        yield endpoint


@pytest.fixture
def serve(endpoint: Endpoint) -> Iterator[Serve]:
    """Start an episode of an engine, or of one that says these replies."""
    with contextlib.ExitStack() as stack:

        def start(engine: InferenceEngine | Script, **settings: Any) -> Served:
            if callable(engine) or isinstance(engine, Sequence):
                engine = ScriptedEngine(engine)
            given = {"tokenizer": TOKENIZER, "sampling": SAMPLING} | settings
            episode = Episode(engine, **given)
            stack.enter_context(served(endpoint, episode))
            client = OpenAI(base_url=episode.base_url, api_key=episode.api_key)
            return Served(episode=episode, client=stack.enter_context(client))

        yield start


@contextlib.contextmanager
def served(endpoint: Endpoint, episode: Episode) -> Iterator[None]:
    """What `endpoint.serve` does, where no loop runs."""
    stack = contextlib.AsyncExitStack()
    enter = stack.enter_async_context(endpoint.serve(episode))
    background.run(enter, timeout_s=10, what="serving an episode")
    try:
        yield
    finally:
        background.run(stack.aclose(), timeout_s=10, what="ending an episode")
