"""The ten-line agent, on the scripted engine."""

import asyncio
import re

import pytest

from arealite.errors import RewardError
from arealite.rewards.math import gsm8k_reward
from arealite.rollout.workflows import ChatWorkflow, SingleTurnWorkflow
from arealite.testing import ScriptedEngine, byte_tokenizer
from arealite.types import Row, SamplingParams
from tests.rollout.agents import CalculatorAgent

ROW = {"question": "What is half of 48?", "answer": "#### 24"}


def test_the_calculator_agent_calls_its_tool_and_answers():
    tokenizer = byte_tokenizer()
    agent = CalculatorAgent(tokenizer, gsm8k_reward, SamplingParams(), group_size=4)
    engine = ScriptedEngine(replies=["<calc>48 / 2</calc>", "#### 24"])

    group = asyncio.run(agent.arun_episode(engine, ROW))

    assert [trajectory.reward for trajectory in group] == [1.0] * 4
    assert "<result>24.0</result>" in tokenizer.decode(group[0].token_ids)
    sampled = [t for t, m in zip(group[0].token_ids, group[0].loss_mask, strict=True) if m]
    assert tokenizer.decode(sampled) == "<calc>48 / 2</calc><|im_end|>#### 24<|im_end|>"


def test_trajectories_hold_exactly_the_tokens_the_engine_saw():
    agent = CalculatorAgent(byte_tokenizer(), gsm8k_reward, SamplingParams(), group_size=1)
    engine = ScriptedEngine(replies=["<calc>48 / 2</calc>", "#### 24"])
    [trajectory] = asyncio.run(agent.arun_episode(engine, ROW))
    last_request = engine.requests[-1].token_ids
    assert trajectory.token_ids[: len(last_request)] == last_request
    assert all(trajectory.loss_mask[len(last_request) :])


def test_a_single_turn_is_graded():
    workflow = SingleTurnWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams(), group_size=2)
    engine = ScriptedEngine(replies=["<<48/2=24>> #### 24"])
    group = asyncio.run(workflow.arun_episode(engine, ROW))
    assert [trajectory.reward for trajectory in group] == [1.0, 1.0]


def test_a_system_prompt_begins_every_conversation():
    workflow = SingleTurnWorkflow(
        byte_tokenizer(), gsm8k_reward, SamplingParams(), system_prompt="Be brief."
    )
    engine = ScriptedEngine(replies=["#### 24"])
    asyncio.run(workflow.arun_episode(engine, ROW))
    prompt = byte_tokenizer().decode(engine.requests[0].token_ids)
    assert re.match(r"<\|im_start\|>system\nBe brief\.<\|im_end\|>\n<\|im_start\|>user", prompt)


def test_a_workflow_without_arun_sample_says_what_is_missing():
    workflow = ChatWorkflow(byte_tokenizer(), gsm8k_reward, SamplingParams())
    with pytest.raises(NotImplementedError, match="must define arun_sample"):
        asyncio.run(workflow.arun_episode(ScriptedEngine(replies=[]), ROW))


def test_a_failed_episode_keeps_the_cause_of_its_error():
    async def fail(text: str, row: Row) -> float:
        raise OSError("the judge is gone")

    workflow = SingleTurnWorkflow(byte_tokenizer(), fail, SamplingParams(), group_size=2)
    with pytest.raises(RewardError) as raised:
        asyncio.run(workflow.arun_episode(ScriptedEngine(replies=["#### 24"]), ROW))
    assert isinstance(raised.value.__cause__, OSError)


def test_a_reward_has_as_long_as_the_workflow_says():
    async def think(text: str, row: Row) -> float:
        await asyncio.sleep(100)
        return 1.0

    workflow = SingleTurnWorkflow(
        byte_tokenizer(), think, SamplingParams(), group_size=2, reward_timeout_s=0.05
    )
    with pytest.raises(RewardError, match=r"longer than 0.05 s \(reward_timeout_s\)"):
        asyncio.run(workflow.arun_episode(ScriptedEngine(replies=["#### 24"]), ROW))
