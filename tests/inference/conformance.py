"""What the contract of `InferenceEngine` is tried with: three engines, and ways to use them."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from arealite import background
from arealite.api import InferenceEngine
from arealite.inference.hf import HFEngine
from arealite.testing import ScriptedEngine
from arealite.types import ModelRequest, ModelResponse, SamplingParams
from tests.inference.parity import Weights, make_prompts, push

MODEL_ENGINES = ("vllm", "hf")
"""Engines with a model, whose weights show in the log-probs."""
ENGINES = (*MODEL_ENGINES, "scripted")
"""`pytest -k "hf or scripted"` leaves out those that need a server."""
CONTEXT, VOCABULARY = 512, 320
"""Of the tiny model; the scripted engine is given the same."""


@contextlib.contextmanager
def running_engine(
    kind: str, request: pytest.FixtureRequest, tiny_model: str
) -> Iterator[InferenceEngine]:
    """An engine of this kind; the real server is started when it is first asked for."""
    if kind == "vllm":
        yield request.getfixturevalue("engine")
    elif kind == "hf":
        with HFEngine(tiny_model) as engine:
            yield engine
    else:
        yield ScriptedEngine(chatter, seconds_per_token=2e-4, max_model_len=CONTEXT)


def chatter(conversation: str) -> str:
    """More than any budget, or, to a quarter of all conversations, a little."""
    return "so " * (8 if sum(map(ord, conversation)) % 4 == 0 else CONTEXT)


def start(
    engine: InferenceEngine, prompts: list[list[int]], *, max_new_tokens: int
) -> list[Future[ModelResponse]]:
    """One request for each prompt, running on the background loop."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    requests = [ModelRequest(token_ids=prompt, sampling=sampling) for prompt in prompts]
    return [background.submit(engine.agenerate(request)) for request in requests]


def wait_until_sampling(engine: InferenceEngine) -> None:
    """Return when requests that were started before have had time for some 24 tokens."""
    [marker] = start(engine, make_prompts(1, seed=99), max_new_tokens=24)
    marker.result(120)


def wait_until(holds: Callable[[], bool], *, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def generate_through_pushes(
    engine: InferenceEngine, prompts: list[list[int]], weights: dict[int, Weights]
) -> list[ModelResponse]:
    """Long responses that begin with the first version; the others come in mid-generation."""
    first, *later = sorted(weights)
    push(engine, weights[first], first)
    running = start(engine, prompts, max_new_tokens=400)
    for version in later:
        wait_until_sampling(engine)
        push(engine, weights[version], version)
    return [response.result(120) for response in running]


def versions_seen(responses: list[ModelResponse]) -> set[int]:
    """Every version that a token was sampled with."""
    return {version for response in responses for version in response.versions}
