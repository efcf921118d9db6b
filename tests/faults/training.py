"""What a run in these tests trains on: rows, a workflow that asks about them, and what is right."""

import itertools
import json
import time
import urllib.request
from collections.abc import Callable

from arealite.inference.vllm import VLLMEngine
from arealite.rewards.pool import RewardFn
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import FaultProxy, ScriptedServer, byte_tokenizer
from arealite.testing.scripted_core import logprob_of, random_script
from arealite.types import Row, SamplingParams
from tests.oracle import Ledger

GENERATE = "/inference/v1/generate"
VOCAB_SIZE = len(byte_tokenizer())
ROWS: list[Row] = [{"question": f"{i} + 1?", "answer": str(i + 1), "id": i} for i in range(10)]
BUDGET = 8
GROUP_SIZE = 2
SCRIPT = random_script(0, VOCAB_SIZE)  # of the servers


async def no_reward(text: str, row: Row) -> float:
    """On the event loop, so that no worker process is needed."""
    return 0.0


def asking(reward: RewardFn = no_reward, *, budget: int = BUDGET) -> SingleTurnWorkflow:
    """A workflow that asks the question of a row twice."""
    sampling = SamplingParams(max_new_tokens=budget)
    return SingleTurnWorkflow(byte_tokenizer(), reward, sampling, group_size=GROUP_SIZE)


async def id_as_reward(text: str, row: Row) -> float:
    return float(row["id"])


def assert_as_sampled(ledger: Ledger) -> None:
    """Every group is whole, and every response is what the server's script says to its prompt."""
    for group in ledger.groups:
        assert len(group) == GROUP_SIZE
        for sample in group:
            start = sample.loss_mask.index(True)
            response = sample.token_ids[start:]
            assert len(response) == BUDGET
            assert response == list(itertools.islice(SCRIPT(sample.token_ids[:start]), BUDGET))
            assert sample.behavior_logprobs[start:] == [logprob_of(token) for token in response]


def is_serving(engine: VLLMEngine, server: ScriptedServer | FaultProxy) -> bool:
    """Whether the client would ask this server now."""
    serving = [known.address for known in engine._fleet.serving()]
    return server.address in serving and not engine._fleet.is_updating


def is_given_up(engine: VLLMEngine, server: ScriptedServer | FaultProxy) -> bool:
    """Whether the client takes this server for dead."""
    [known] = [known for known in engine._fleet.servers if known.address == server.address]
    return known.state == "down"


def post(address: str, path: str, body: dict[str, object] | None = None) -> None:
    """One request by hand, as somebody else would send it."""
    request = urllib.request.Request(
        address + path,
        data=json.dumps(body or {}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        reply.read()


def wait_until(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
