"""One sample of a group is lost: the group is trained on whole, or not at all."""

import json
from collections.abc import Callable
from itertools import count

import pytest

from arealite.inference.vllm import VLLMEngine
from arealite.rollout.workflows import SingleTurnWorkflow
from arealite.testing import FaultProxy, ScriptedEngine, ScriptedServer, byte_tokenizer
from arealite.testing.fault_proxy import Exchange
from arealite.testing.faults import Status
from arealite.types import Row, SamplingParams
from tests.faults.training import GENERATE, ROWS, VOCAB_SIZE, no_reward
from tests.oracle import Ledger, Oracle

GROUP_SIZE = 4


def asking_four_times(reward: Callable[..., object] = no_reward) -> SingleTurnWorkflow:
    sampling = SamplingParams(max_new_tokens=64)
    return SingleTurnWorkflow(byte_tokenizer(), reward, sampling, group_size=GROUP_SIZE)  # type: ignore[arg-type]


def assert_one_group_dropped_whole(ledger: Ledger) -> None:
    assert {len(group) for group in ledger.groups} == {GROUP_SIZE}
    assert len(ledger.lost) == 1


@pytest.mark.fault(54, "a proxy answers 400 to one of the four requests of a group")
def test_a_group_with_a_refused_request_is_dropped_and_its_other_requests_end(
    oracle: Oracle,
    scripted_server: Callable[..., ScriptedServer],
    fault_proxy: Callable[..., FaultProxy],
    connect: Callable[..., VLLMEngine],
):
    server = scripted_server(vocab_size=VOCAB_SIZE, tokens_per_s=100)
    proxy = fault_proxy(server.address)
    rows: list[Row] = [{"question": f"{i} + 1?"} for i in range(100)]  # each is used once
    refuse = lambda: proxy.inject(Status(400), on=[2], path=GENERATE)  # noqa: E731
    ledger = oracle.train(connect(proxy), asking_four_times(), rows, at={0: refuse})
    assert_one_group_dropped_whole(ledger)
    exchanges = proxy.exchanges_of(GENERATE)
    [refused] = [exchange for exchange in exchanges if exchange.fault]
    of_group = [exchange for exchange in exchanges if prompt(exchange) == prompt(refused)]
    # None: the client left before there was a reply.
    assert {exchange.status for exchange in of_group} == {400, None}


def prompt(exchange: Exchange) -> list[int]:
    return json.loads(exchange.request.body)["token_ids"]


@pytest.mark.fault(54, "a reward raises for one of the four samples of a group")
def test_a_group_with_a_sample_that_has_no_reward_is_dropped(oracle: Oracle):
    calls = count()

    async def fails_once(text: str, row: Row) -> float:
        if next(calls) == 6:
            raise OSError("no luck")
        return 0.0

    engine = ScriptedEngine(replies=["fine"])
    ledger = oracle.train(engine, asking_four_times(fails_once), ROWS)
    assert_one_group_dropped_whole(ledger)
    [reason] = ledger.reasons.values()
    assert "Reward" in reason and "raised OSError: no luck" in reason
